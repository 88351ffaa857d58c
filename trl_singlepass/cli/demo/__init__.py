"""A tiny model, conversations and logs, to try everything without a network: `demo-model` and `demo-data`."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DATA = Path(__file__).with_name("conversations.jsonl")
"""240 conversations of 3 to 12 turns, which `demo/make_data.py` of the repository generates."""
TOKENIZER = Path(__file__).with_name("tokenizer")
"""A tokenizer of 2,048 tokens, trained on `DATA`, with a chat template that renders history as Qwen3's does."""
LOGS = Path(__file__).with_name("logs")
"""Logs of agents, one with a compaction and one with requests of a proxy, and the schema of their tool."""
SEED = 0


def make_demo_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a Qwen3 with 2 million random weights in float32, the same ones every time."""
    from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

    set_seed(SEED)
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
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype="float32")
    return model


def write_demo_model(folder: str) -> str:
    """Write the demo's model and its tokenizer to a folder, and return a line that says so."""
    if Path(folder).is_file():  # transformers would log a line and write nothing
        raise ValueError(f"{folder} is a file. Expected a folder to write.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = make_demo_model(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"Wrote a Qwen3 with {model.num_parameters() / 1e6:.1f} million random weights to {folder}"


def write_demo_data(file: str) -> str:
    """Write the demo's conversations to a JSON Lines file, and return a line that says so."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(DATA, file)
    with DATA.open(encoding="utf-8") as lines:
        return f"Wrote {sum(1 for _ in lines)} conversations to {file}"


def write_demo_pairs(file: str) -> str:
    """Write preference pairs, made of the demo's conversations, to a JSON Lines file; return a line that says so."""
    with DATA.open(encoding="utf-8") as lines:
        pairs = list(as_pairs(list(map(json.loads, lines))))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(f"{json.dumps(pair, ensure_ascii=False)}\n" for pair in pairs), "utf-8")
    return f"Wrote {len(pairs)} preference pairs to {file}"


def write_demo_logs(folder: str) -> str:
    """Write logs of agents to a folder, for `import`, and return a line that says so."""
    shutil.copytree(LOGS, folder, dirs_exist_ok=True)
    return f"Wrote logs of agents to {folder}: {', '.join(sorted(path.name for path in LOGS.iterdir()))}"


def as_pairs(conversations: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield pairs that prefer each conversation to the same one with the answers of the next."""
    for conversation, other in zip(conversations, [*conversations[1:], *conversations[:1]], strict=True):
        messages = conversation["messages"]
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        answers = itertools.cycle(filter(_is_answer, other["messages"]))
        rejected = [next(answers) if _is_answer(message) else message for message in messages[first:]]
        columns = {"prompt": messages[:first], "chosen": messages[first:], "rejected": rejected}
        yield {**columns, **{name: value for name, value in conversation.items() if name != "messages"}}


def share_of_vowels(completions: Sequence[Sequence[Mapping[str, Any]]], **_: object) -> list[float]:
    """Return a reward that a model with random weights can learn: how many of the letters are vowels."""
    texts = [completion[0]["content"].lower() for completion in completions]
    letters = [[letter for letter in text if letter.isalpha()] for text in texts]
    return [sum(letter in "aeiou" for letter in some) / max(1, len(some)) for some in letters]


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls")
