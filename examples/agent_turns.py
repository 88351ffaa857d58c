"""
Train on the log of an agent: the tokens that an inference server received in every call, and those it generated.

    trl-singlepass demo-data out/demo-data.jsonl
    python examples/agent_turns.py

Training uses no chat template, so nothing can be rendered differently from how it was served: rewritten histories,
cleared tool results and templates that no longer exist are all in the log. Calls of one episode share their common
prefixes. To train the same log from the command line: `trl-singlepass train --config recipes/tokenized-turns.yaml`.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer, render_samples


CONVERSATIONS = "out/demo-data.jsonl"


def served_calls(path: str, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield one line per call, as a server would log it. Here, recorded conversations take the part of the agent."""
    for episode, row in enumerate(map(json.loads, Path(path).read_text().splitlines())):
        for call in render_samples(row["messages"], tokenizer, tools=row.get("tools")):
            yield {
                "conversation_id": episode,
                "prompt_ids": call.token_ids[: call.prompt_length].tolist(),
                "completion_ids": call.token_ids[call.prompt_length :].tolist(),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"))
    parser.add_argument("--log", type=Path, default=Path("out/agent-turns.jsonl"))
    parser.add_argument("--max_steps", type=int, default=10)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    with options.log.open("w") as log:
        log.writelines(json.dumps(call) + "\n" for call in served_calls(CONVERSATIONS, tokenizer))

    trainer = SinglePassSFTTrainer(
        model=options.model,
        args=SinglePassSFTConfig(
            output_dir="out/agent-turns",
            max_steps=options.max_steps,
            per_device_train_batch_size=2,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=str(options.log), split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
