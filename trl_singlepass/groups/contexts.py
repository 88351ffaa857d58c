"""
Rollouts of several requests: each generated token is scored in the prompt that its own request was sent.

A rollout is one line for TRL: all tokens that were generated, request after request. Here it is a line for each
request. If request 1 made `a b` from the prompt `p`, and request 2 made `c` from the prompt `q`, the line of TRL is
`p a b c`, and those that are scored are `p a b` and `q c`.

Shape letters: B rollouts of C completion tokens, N requests of T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .lines import PaddedLines


@dataclass(frozen=True, eq=False)
class Rollout:
    """The requests of a rollout, in the order of the tokens of its completion."""

    prompts: tuple[torch.Tensor, ...]  # of int64
    lengths: tuple[int, ...]  # of what followed each prompt, in tokens
    is_scored: torch.Tensor  # (sum(lengths),): False for what an environment wrote


def read_rollouts(
    output: Mapping[str, Any], vocab_size: int, placeholder: int | None = None, *, makes_contexts: bool = False
) -> list[Rollout] | None:
    """
    Return the rollouts that a `rollout_func` made, or `None` if it gives no `contexts`.

    With `makes_contexts`, one that gives an `env_mask` alone has one request per rollout. `placeholder` is the token
    that stands for images. Raises `ValueError` if a field does not fit the completions.
    """
    completions, masks, contexts = output["completion_ids"], output.get("env_mask"), output.get("contexts")
    if contexts is None and makes_contexts and masks is not None:
        contexts = [[(p, len(c))] for p, c in zip(output["prompt_ids"], completions, strict=True)]
    if contexts is None:
        return None
    fields = {"contexts": contexts, "prompt_ids": output["prompt_ids"]}
    _check_lengths(fields | {name: output.get(name) for name in ("logprobs", "env_mask")}, completions)
    rollouts = []
    for index, (requests, completion) in enumerate(zip(contexts, completions, strict=True)):
        mask = [1] * len(completion) if masks is None else masks[index]
        rollouts.append(_read_rollout(f"[{index}]", requests or (), completion, mask))
        ids = torch.cat([*rollouts[-1].prompts, torch.as_tensor(completion)])
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"contexts[{index}] or completion_ids[{index}] has token ids outside of the vocabulary of "
                f"{vocab_size}: {int(ids.min())} to {int(ids.max())}. Tokenize with the tokenizer of the model."
            )
        if placeholder is not None and placeholder in ids:
            raise ValueError(f"contexts[{index}] shows images, which requests cannot. Leave out the images.")
    return rollouts


def _read_rollout(where: str, requests: Sequence[Any], completion: Sequence[int], mask: Sequence[int]) -> Rollout:
    """Return the requests of one rollout; `where` is its place in each field."""
    prompts = tuple(torch.as_tensor(prompt, dtype=torch.int64) for prompt, _ in requests)
    lengths = tuple(int(length) for _, length in requests)
    if not requests or not all(map(len, prompts)):
        raise ValueError(
            f"contexts{where} is missing, or has a request without a prompt. Give each rollout a list of (prompt_ids, "
            "number of tokens)."
        )
    if not len(completion):
        raise ValueError(f"completion_ids{where} is empty: no request generated a token. Leave out this rollout.")
    if min(lengths) < 0 or sum(lengths) != len(completion):
        raise ValueError(
            f"contexts{where} counts {' + '.join(map(str, lengths))} = {sum(lengths)} tokens, and "
            f"completion_ids{where} has {len(completion)}. Count each token of completion_ids in one request."
        )
    return Rollout(prompts, lengths, torch.as_tensor(mask).bool())


def _check_lengths(fields: Mapping[str, Sequence[Any] | None], completions: Sequence[Any]) -> None:
    """Refuse fields with another number of rollouts, or with another number of tokens; TRL would pad a short one."""
    for name, values in fields.items():
        if values is not None and len(values) != len(completions):
            raise ValueError(f"{name} has {len(values)} rollouts, and completion_ids has {len(completions)}.")
        for index, own in enumerate(values or () if name in ("logprobs", "env_mask") else ()):
            if len(own) != len(completions[index]):
                found = f"{name}[{index}] has {len(own)} tokens"
                raise ValueError(f"{found}, and completion_ids[{index}] has {len(completions[index])}.")


@dataclass(frozen=True, eq=False)
class RequestLines:
    """The requests of some rollouts, one line for each: prompts padded on the left, what followed on the right."""

    padded: PaddedLines
    is_output: torch.Tensor  # (N, M), of the M tokens of the longest output: what is no padding
    is_completion: torch.Tensor  # (B, C): the same tokens, in the lines of rollouts
    is_scored: torch.Tensor  # (B, C)

    @classmethod
    def from_rollouts(
        cls, rollouts: Sequence[Rollout], completion_ids: torch.Tensor, completion_mask: torch.Tensor
    ) -> RequestLines:
        """Lay out rollouts, whose completions have shape `(B, C)`; masked tokens of them are left out."""
        device = completion_ids.device
        lengths = torch.tensor(list(chain.from_iterable(rollout.lengths for rollout in rollouts)))
        totals = torch.tensor([sum(rollout.lengths) for rollout in rollouts])
        is_output = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
        is_completion = (torch.arange(completion_ids.shape[1]) < totals[:, None]).to(device)
        scored = torch.cat([rollout.is_scored for rollout in rollouts]).to(device)
        is_scored = torch.zeros_like(is_completion).masked_scatter(is_completion, scored)
        # Both orders are the same: rollout by rollout, request by request, token by token.
        outputs, kept = (
            torch.zeros(is_output.shape, dtype=x.dtype, device=device).masked_scatter(is_output, x[is_completion])
            for x in (completion_ids, completion_mask)
        )
        prompts = list(chain.from_iterable(rollout.prompts for rollout in rollouts))
        ids, mask = (
            pad_sequence(x, batch_first=True, padding_side="left").to(device)
            for x in (prompts, list(map(torch.ones_like, prompts)))
        )
        padded = PaddedLines(torch.cat([ids, outputs], dim=1), torch.cat([mask, kept.to(mask.dtype)], dim=1))
        return cls(padded, is_output, is_completion, is_scored)

    def in_rollouts(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of tokens, `(N, M)`, in the lines of their rollouts, `(B, C)`; 0 for what is masked."""
        lines = values.new_zeros(self.is_completion.shape)
        return lines.masked_scatter(self.is_completion, values[self.is_output]) * self.is_scored
