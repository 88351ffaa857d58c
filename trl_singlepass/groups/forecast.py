"""What sharing prefixes will save in a run with groups of completions, said before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin


_NUM_PROMPTS = 64


def forecast_sharing(dataset: Any, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, args: Any) -> tuple[str, int]:
    """
    Return a line for the log, and its level.

    It counts the first prompts of a dataset, and completions at their full length: shorter ones share more. `args` are
    those of the trainer.
    """
    lengths = [_num_tokens(example["prompt"], tokenizer, args) for example in islice(iter(dataset), _NUM_PROMPTS)]
    together = min(args.num_generations, args.per_device_train_batch_size)
    factor = sharing_factor(lengths, together, args.max_completion_length)
    median = sorted(lengths)[len(lengths) // 2]
    line = (
        f"prompts of about {median} tokens, {together} completions of at most {args.max_completion_length} in a batch"
    )
    if factor < 1.1:
        return f"Trees save little here ({line}): at least a sharing factor of {factor:.2f}.", logging.INFO
    return f"Sharing factor of at least {factor:.2f}, by {line}.", logging.INFO


def sharing_factor(prompt_lengths: Sequence[int], num_together: int, completion_length: int) -> float:
    """
    Return tokens of lines ÷ tokens of trees.

    Prompts of 100 tokens with 4 completions of 50 make 4 · 150 = 600 tokens in lines and 100 + 4 · 50 = 300 in trees.
    """
    lines = sum(num_together * (length + completion_length) for length in prompt_lengths)
    trees = sum(length + num_together * completion_length for length in prompt_lengths)
    return lines / trees


def _num_tokens(prompt: Any, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, args: Any) -> int:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(prompt, str):
        options = getattr(args, "chat_template_kwargs", None) or {}
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **options)
    return len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
