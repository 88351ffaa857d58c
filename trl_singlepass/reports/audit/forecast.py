"""What training the same turns costs by each schedule: counted for single conversations, summed up for a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cost.flops import ONE_LAYER, Cost, ModelShape, npass_cost, single_pass_cost
from ...rendering.tokenization import common_length
from ...trees.prefix_tree import PrefixTree
from ...trees.sample import Sample
from .estimates import Estimate, ratio


NPASS, CHAINS = "N-pass", "N-pass of maximal chains"
SINGLE_PASS, SHARED = "single pass", "single pass, shared prefixes"
SCHEDULES = (NPASS, CHAINS, SINGLE_PASS, SHARED)
ROW_TOKENS = 32_768
# Gains below this are in the noise of kernels, padding and data loading.
WORTHWHILE = 1.1

# Without a model's config, pairs are counted for one layer of full attention and nothing else is.


@dataclass(frozen=True, slots=True)
class ConversationCost:
    """
    Counted work of one conversation.

    Args:
        by_schedule (`dict[str, Cost]`):
            Cost of N-pass, of N-pass of maximal chains and of the single pass.
        num_turns (`int`):
            Number of samples.
        num_chains (`int`):
            Number of samples that no other one begins with.
        first_prompt (`numpy.ndarray` of `numpy.int32`):
            Tokens of the first prompt, which other conversations may begin with as well.
    """

    by_schedule: dict[str, Cost]
    num_turns: int
    num_chains: int
    first_prompt: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Forecast:
    """
    What training a dataset once costs by each schedule.

    Args:
        costs (`dict[str, Cost]`):
            Cost of each of `SCHEDULES`, for the conversations that were audited. Attention pairs are those of one
            layer and operations are 0 if no model was given.
        sharing_factor (`Estimate`):
            Tokens of all samples ÷ tokens of the trees.
        over_npass (`Estimate`):
            Counted work of N-pass ÷ that of the single pass; tokens instead of work if no model was given.
        over_chains (`Estimate`):
            The same against N-pass of maximal chains: the most that N-pass can save without a tree.
        shared_over_npass (`Estimate`):
            As `over_npass`, for conversations that share their prefix in rows of `ROW_TOKENS` tokens. A lower bound:
            in a sample, fewer conversations begin alike.
        has_model (`bool`):
            Whether operations were counted.
    """

    costs: dict[str, Cost]
    sharing_factor: Estimate
    over_npass: Estimate
    over_chains: Estimate
    shared_over_npass: Estimate
    has_model: bool

    @property
    def verdict(self) -> str:
        """What to make of it, in a sentence."""
        gain, what = self.over_npass.value, "work" if self.has_model else "tokens"
        extra = self.shared_over_npass.value / gain
        sharing = ""
        if extra >= WORTHWHILE:
            sharing = (
                f" Packing conversations that begin alike saves more: {self.shared_over_npass.value:.2f} × in all."
            )
        if gain < WORTHWHILE:
            return (
                f"A single pass saves too little to matter here: N separate samples cost {gain:.2f} × its {what}. "
                f"It is exact all the same.{sharing}"
            )
        if self.over_chains.value < WORTHWHILE:
            return (
                f"A single pass saves {1 - 1 / gain:.0%} of the {what} of N separate samples, but too little to "
                f"matter over samples merged where one begins another ({self.over_chains.value:.2f} ×).{sharing}"
            )
        return (
            f"A single pass saves {1 - 1 / gain:.0%} of the {what} of N separate samples: expect up to {gain:.2f} × "
            f"the speed, and up to {self.over_chains.value:.2f} × that of samples merged where one begins another."
            f"{sharing}"
        )


def conversation_cost(samples: Sequence[Sample], shape: ModelShape) -> ConversationCost:
    """
    Count the work of one conversation.

    Args:
        samples (`Sequence[Sample]`):
            Its samples.
        shape (`ModelShape`):
            Sizes of the model.

    Returns:
        `ConversationCost`: The counts.
    """
    chains = maximal_chains(samples)
    costs = {
        NPASS: npass_cost(samples, shape),
        CHAINS: npass_cost(chains, shape),
        SINGLE_PASS: single_pass_cost([PrefixTree.from_samples(samples)], shape),
    }
    prompt = samples[0].token_ids[: samples[0].prompt_length].astype(np.int32)
    return ConversationCost(costs, len(samples), len(chains), prompt)


def maximal_chains(samples: Sequence[Sample]) -> list[Sample]:
    """
    Merge samples that begin another one into it, so that it has several trained stretches.

    This is the most that can be saved without a tree, and as exact as separate samples: what comes later in a sequence
    has no effect on what comes before.

    Args:
        samples (`Sequence[Sample]`):
            Samples of one conversation.

    Returns:
        `list[Sample]`: Samples of which none begins another, with the loss weights of all.
    """
    chains: list[Sample] = []
    for sample in sorted(samples, key=len, reverse=True):
        length = len(sample)
        index = next((i for i, c in enumerate(chains) if np.array_equal(c.token_ids[:length], sample.token_ids)), None)
        if index is None:
            chains.append(sample)
            continue
        weights = chains[index].loss_weights.copy()
        weights[:length] += sample.loss_weights
        chains[index] = Sample(chains[index].token_ids, weights, chains[index].prompt_length)
    return chains


def forecast(conversations: Sequence[ConversationCost], shape: ModelShape, coverage: float) -> Forecast:
    """
    Sum up the work of a dataset.

    Args:
        conversations (`Sequence[ConversationCost]`):
            At least one conversation.
        shape (`ModelShape`):
            Sizes of the model.
        coverage (`float`):
            Part of the dataset that they are a random sample of.

    Returns:
        `Forecast`: The forecast.
    """
    costs = {name: [conversation.by_schedule[name] for conversation in conversations] for name in SCHEDULES[:3]}
    shared = _shared_prefixes([c.first_prompt for c in conversations], [cost.tokens for cost in costs[SINGLE_PASS]])
    saved = [_prefix_cost(length, shape) for length in shared]
    costs[SHARED] = [_difference(cost, less) for cost, less in zip(costs[SINGLE_PASS], saved, strict=True)]
    has_model = shape is not ONE_LAYER
    work = {name: [float(c.flops if has_model else c.tokens) for c in costs[name]] for name in SCHEDULES}
    tokens = {name: [float(cost.tokens) for cost in costs[name]] for name in SCHEDULES}
    return Forecast(
        costs={name: _sum(costs[name]) for name in SCHEDULES},
        sharing_factor=ratio(tokens[NPASS], tokens[SINGLE_PASS], coverage),
        over_npass=ratio(work[NPASS], work[SINGLE_PASS], coverage),
        over_chains=ratio(work[CHAINS], work[SINGLE_PASS], coverage),
        shared_over_npass=ratio(work[NPASS], work[SHARED], coverage),
        has_model=has_model,
    )


def _shared_prefixes(prompts: Sequence[NDArray[np.int32]], lengths: Sequence[int]) -> list[int]:
    """For each conversation, how much of its first prompt the one before it in its row has already."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].astype(">u4").tobytes())
    shared, row_tokens, previous = [0] * len(prompts), 0, None
    for index in order:
        length = common_length(prompts[previous], prompts[index]) if previous is not None else 0
        if row_tokens + lengths[index] - length > ROW_TOKENS:
            row_tokens, length = 0, 0
        shared[index] = length
        row_tokens, previous = row_tokens + lengths[index] - length, index
    return shared


def _prefix_cost(length: int, shape: ModelShape) -> Cost:
    if length == 0:
        return Cost(0, 0, 0, 0)
    return npass_cost([Sample(np.zeros(length, np.int64), np.zeros(length), length)], shape)


def _difference(cost: Cost, less: Cost) -> Cost:
    return Cost(
        cost.tokens - less.tokens,
        cost.attention_pairs - less.attention_pairs,
        cost.targets - less.targets,
        cost.flops - less.flops,
    )


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(
        sum(cost.tokens for cost in costs),
        sum(cost.attention_pairs for cost in costs),
        sum(cost.targets for cost in costs),
        sum(cost.flops for cost in costs),
    )
