"""
Extract the shapes of real conversations: lengths of their turns and of what turns share, without any of their text.

    python -m benchmarks.shapes TOKENIZER conversations.jsonl --chat_template qwen3.jinja

reads a file of conversations, picks those at the quartiles of the number of N-pass tokens, and writes their shapes to
benchmarks/shapes/<name of the file>.json, for `benchmarks.step_time --shapes`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_singlepass import Sample
from trl_singlepass.cli.loading import load_tokenizer
from trl_singlepass.data.files import load_examples
from trl_singlepass.rendering.conversation import Conversation
from trl_singlepass.rendering.history import render_with_history
from trl_singlepass.trees.shared_array import common_prefix_length


SHAPES = Path(__file__).parent / "shapes"
QUARTILES = (0.25, 0.5, 0.75)


def get_shape(samples: Sequence[Sample]) -> list[dict[str, int]]:
    """Return, for each sample, the earlier sample that it shares most tokens with, their number, and its lengths."""
    shape = []
    for index, sample in enumerate(samples):
        shared = [common_prefix_length(sample.token_ids, earlier.token_ids) for earlier in samples[:index]]
        source = int(np.argmax(shared)) if shared else 0
        shape.append(
            {
                "source": source,
                "shared": shared[source] if shared else 0,
                "prompt": sample.prompt_length,
                "reasoning": sample.reasoning_length,
                "length": len(sample),
            }
        )
    return shape


def make_samples(shape: Sequence[dict[str, int]], vocabulary: int, seed: int = 0) -> list[Sample]:
    """Return random samples of a shape; no two samples share more tokens than the shape says."""
    random, samples = np.random.default_rng(seed), []
    for index, sizes in enumerate(shape):
        beginning = samples[sizes["source"]].token_ids[: sizes["shared"]] if samples else np.empty(0, np.int64)
        rest = random.integers(len(shape), vocabulary, size=sizes["length"] - len(beginning))
        rest[:1] = index  # no other sample continues with this token
        ids = np.concatenate([beginning, rest])
        prompt = sizes["prompt"]
        sample = Sample.from_prompt_and_completion(ids[:prompt], ids[prompt:], index, sizes["reasoning"])
        samples.append(sample)
    return samples


def read_shapes(name: str) -> list[dict[str, Any]]:
    """Return the shapes of the conversations in a file, as written by `main`."""
    shapes: list[dict[str, Any]] = json.loads((SHAPES / f"{name}.json").read_text())["conversations"]
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.shapes", description=__doc__.splitlines()[1])
    parser.add_argument("tokenizer")
    parser.add_argument("data", type=Path)
    parser.add_argument("--chat_template", help="file with a chat template to use instead of the tokenizer's own")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer, chat_template=args.chat_template)
    conversations = [Conversation.from_example(dict(row)) for row in load_examples(str(args.data))]
    rendered = [render_with_history(conversation, tokenizer, "template") for conversation in conversations]
    order = np.argsort([sum(map(len, samples)) for samples in rendered], kind="stable")
    chosen = [int(order[int(quartile * (len(order) - 1))]) for quartile in QUARTILES]
    result = {
        "tokenizer": Path(args.tokenizer).name,
        "chat_template": Path(args.chat_template).name if args.chat_template else None,
        "conversations": [
            {
                "row": row,
                "template": get_shape(rendered[row]),
                "keep": get_shape(render_with_history(conversations[row], tokenizer, "keep")),
            }
            for row in chosen
        ],
    }
    SHAPES.mkdir(exist_ok=True)
    path = SHAPES / f"{args.data.stem}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
