"""Load model, tokenizer and conversations: those of the demo, or the user's own."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, set_seed


HERE = Path(__file__).parent
SEED = 0


def load_tokenizer(model: str | None) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model or HERE / "tokenizer")


def load_model(model: str | None, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """Return a small Qwen3 with random weights, or the model of a path or Hub id, in float32 for exact comparison."""
    set_seed(SEED)
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_rows(data: str | None, count: int) -> list[dict[str, Any]]:
    """Return the first conversations of the demo, of a JSON Lines or Parquet file, or of a dataset on the Hub."""
    if data is None:
        lines = (HERE / "data" / "conversations.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[:count]]
    from datasets import load_dataset

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(data).suffix)
    dataset = load_dataset(kind, data_files=data, split="train") if kind else load_dataset(data, split="train")
    return dataset.select(range(min(count, len(dataset)))).to_list()
