"""Load model, tokenizer and conversations: those of the demo, or the user's own."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from trl_singlepass.cli.demo import DATA, SEED, TOKENIZER, make_demo_model


def load_tokenizer(model: str | None) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model or TOKENIZER)


def load_model(model: str | None, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """Return a small Qwen3 with random weights, or the model of a path or Hub id, in float32 for exact comparison."""
    if model is None:
        return make_demo_model(tokenizer)
    set_seed(SEED)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def load_rows(data: str | None, count: int) -> list[dict[str, Any]]:
    """Return the first conversations of the demo, of a JSON Lines or Parquet file, or of a dataset on the Hub."""
    if data is None:
        lines = DATA.read_text().splitlines()
        return [json.loads(line) for line in lines[:count]]
    from datasets import load_dataset

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(data).suffix)
    dataset = load_dataset(kind, data_files=data, split="train") if kind else load_dataset(data, split="train")
    return dataset.select(range(min(count, len(dataset)))).to_list()
