"""What training costs by each schedule: numbers, without their wording."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ...cost.flops import ONE_LAYER, Cost, ModelShape, npass_cost, prefix_cost, single_pass_cost
from ...rendering.tokenization import common_length
from ...trees.image_features import to_keys
from ...trees.prefix_tree import lay_out
from ...trees.radix import RadixNode, SampleMerger
from ...trees.sample import Sample


ROW_TOKENS = 32_768
Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % confidence interval: the value itself for a whole dataset, `None` for a sample of one."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f} ± ?"
        half = (self.high - self.low) / 2
        if half == 0:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ± {half:.2f}" if half >= 0.005 else f"{self.value:.2f} ± <0.01"


def estimate_ratio(numerators: Sequence[float], denominators: Sequence[float], coverage: float) -> Estimate:
    """
    Estimate the ratio of two totals of a dataset from those of each conversation in a random sample.

    `coverage` is the fraction of the dataset that was sampled: 1 for all of it, 0 if its size is unknown. The interval
    is that of the linearised ratio estimator, under the finite-population correction.

    Source: Cochran, *Sampling Techniques* (1977), formula 6.13.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    value, size = float(top.sum() / bottom.sum()), len(top)
    if coverage == 1:
        return Estimate(value, value, value)
    if size < 2:
        return Estimate(value, None, None)
    residuals = top - value * bottom
    half = Z_95 * float(np.sqrt((1 - coverage) * size / (size - 1) * (residuals**2).sum())) / float(bottom.sum())
    return Estimate(value, value - half, value + half)


class Schedule(StrEnum):
    """A way to compute the same losses."""

    NPASS = "N-pass"
    """Every sample is a sequence of its own, without padding."""
    CHAINS = "N-pass of maximal chains"
    """Samples that begin another one are merged into it."""
    SINGLE_PASS = "single pass"
    """One prefix tree per conversation."""
    SHARED = "single pass, shared prefixes"
    """Conversations that begin alike also share their first prompt, in rows of `ROW_TOKENS` tokens."""


@dataclass(frozen=True, slots=True)
class ConversationCost:
    """Counted work of one conversation."""

    by_schedule: dict[Schedule, Cost]  # without `Schedule.SHARED`, which depends on the other conversations
    num_turns: int
    num_chains: int  # samples with which no other sample begins
    first_prompt: NDArray[np.int32]  # (num_tokens,): other conversations may begin with it as well


@dataclass(frozen=True, slots=True)
class Forecast:
    """
    Cost of one epoch by each schedule.

    Without a model, attention pairs are those of one layer of full attention, operations are 0, and ratios are of
    tokens instead of work. `over_chains` compares with the cheapest exact way without a tree. `shared_over_npass` is a
    lower bound: fewer conversations of a random sample begin alike than of the whole dataset.
    """

    costs: dict[Schedule, Cost]  # of the audited conversations
    sharing_factor: Estimate  # tokens of all samples ÷ tokens of the trees
    over_npass: Estimate  # counted work of N-pass ÷ that of the single pass
    over_chains: Estimate
    shared_over_npass: Estimate  # as `over_npass`, for conversations that share their first prompt
    has_model: bool  # whether operations were counted


@dataclass(frozen=True, slots=True)
class SharingByTurns:
    """Token sharing in the conversations that have a given number of turns."""

    num_turns: int
    conversations: int
    npass_tokens: int
    tree_tokens: int

    @property
    def sharing_factor(self) -> float:
        """Tokens of the samples ÷ tokens of the trees."""
        return self.npass_tokens / self.tree_tokens


def count_conversation(samples: Sequence[Sample], shape: ModelShape) -> ConversationCost:
    """Count the work of one conversation."""
    merger = SampleMerger()
    for index, sample in enumerate(samples):
        merger.add(sample, index)
    root = merger.finish()
    # Sequences are counted one by one: together, their tokens grow with the square of the number of turns.
    chains = [npass_cost([chain], shape) for chain in maximal_chains(samples, root)]
    costs = {
        Schedule.NPASS: Cost.total(npass_cost([sample], shape) for sample in samples),
        Schedule.CHAINS: Cost.total(chains),
        Schedule.SINGLE_PASS: single_pass_cost([lay_out(root)], shape),
    }
    prompt = samples[0].token_ids[: samples[0].prompt_length].astype(np.int32)
    return ConversationCost(costs, len(samples), len(chains), prompt)


def maximal_chains(samples: Sequence[Sample], root: RadixNode) -> Iterator[Sample]:
    """
    Merge every sample that begins another one into it, so that one sequence trains several turns.

    Nothing saves more without a tree, and under causal attention it is as exact. Samples `[1, 2]` and `[1, 2, 3, 4]`
    become `[1, 2, 3, 4]` with the loss weights of both; `[1, 2, 5]` stays on its own. A sample that begins several
    others is merged into the longest. `root` is that of the samples' radix tree. The longest chains come first.
    """
    ends, parents = _find_ends(samples, root)
    chains: list[list[Sample]] = []
    chain_of: dict[RadixNode, list[Sample]] = {}
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i]), reverse=True):
        node: RadixNode | None = ends[index]
        if node in chain_of:  # on the way to the end of a longer sample
            chain_of[node].append(samples[index])
            continue
        chains.append([samples[index]])
        while node is not None and node not in chain_of:
            chain_of[node], node = chains[-1], parents.get(node)
    return map(_join, chains)


def _find_ends(samples: Sequence[Sample], root: RadixNode) -> tuple[list[RadixNode], dict[RadixNode, RadixNode]]:
    """Return the node of a radix tree with which each sample ends, and the parents of all nodes."""
    ends: list[RadixNode] = []
    parents: dict[RadixNode, RadixNode] = {}
    path, previous = [(root, 0)], samples[0]
    for sample in samples:
        known = sample.tokens.shared_length(previous.tokens) if sample.image_features is None else 0
        while len(path) > 1 and path[-1][1] >= known:  # one token of a node is enough to tell it from the others
            path.pop()
        node, begin = path[-1]
        features = None if sample.image_features is None else sample.image_features[begin:]
        keys, start = to_keys(sample.tokens.tail(begin), features), begin
        while (begin := begin + len(node.tokens)) < len(sample):
            child = node.find_child(keys[begin - start])
            assert child is not None, "every sample must be a path of its tree"
            parents[child], node = node, child
            path.append((node, begin))
        ends.append(node)
        previous = sample
    return ends, parents


def _join(samples: Sequence[Sample]) -> Sample:
    """Return the first of some samples, which begins with all the others, with the loss weights of all."""
    longest, *others = samples
    if not others:
        return longest
    weights = longest.loss_weights.copy()
    for sample in others:
        weights[sample.weights.kept : len(sample)] += sample.weights.own
    return Sample(longest.tokens, weights, longest.prompt_length)


def make_forecast(conversations: Sequence[ConversationCost], shape: ModelShape, coverage: float) -> Forecast:
    """Sum up the cost of conversations: a random sample of a dataset, of which they are the fraction `coverage`."""
    counted = (Schedule.NPASS, Schedule.CHAINS, Schedule.SINGLE_PASS)
    costs = {schedule: [conversation.by_schedule[schedule] for conversation in conversations] for schedule in counted}
    trees = costs[Schedule.SINGLE_PASS]
    shared = _shared_prefixes([c.first_prompt for c in conversations], [cost.tokens for cost in trees])
    costs[Schedule.SHARED] = [tree - prefix_cost(length, shape) for tree, length in zip(trees, shared, strict=True)]
    has_model = shape is not ONE_LAYER

    def ratio(numerator: Schedule, denominator: Schedule, unit: str) -> Estimate:
        above, below = ([float(getattr(cost, unit)) for cost in costs[s]] for s in (numerator, denominator))
        return estimate_ratio(above, below, coverage)

    work = "flops" if has_model else "tokens"
    return Forecast(
        costs={schedule: Cost.total(costs[schedule]) for schedule in Schedule},
        sharing_factor=ratio(Schedule.NPASS, Schedule.SINGLE_PASS, "tokens"),
        over_npass=ratio(Schedule.NPASS, Schedule.SINGLE_PASS, work),
        over_chains=ratio(Schedule.CHAINS, Schedule.SINGLE_PASS, work),
        shared_over_npass=ratio(Schedule.NPASS, Schedule.SHARED, work),
        has_model=has_model,
    )


def sharing_by_turns(costs: Sequence[ConversationCost]) -> tuple[SharingByTurns, ...]:
    """Sum up the tokens of conversations by their number of turns."""
    groups: dict[int, list[ConversationCost]] = defaultdict(list)
    for cost in costs:
        groups[cost.num_turns].append(cost)
    return tuple(
        SharingByTurns(
            num_turns,
            len(group),
            sum(cost.by_schedule[Schedule.NPASS].tokens for cost in group),
            sum(cost.by_schedule[Schedule.SINGLE_PASS].tokens for cost in group),
        )
        for num_turns, group in sorted(groups.items())
    )


def _shared_prefixes(prompts: Sequence[NDArray[np.int32]], lengths: Sequence[int]) -> list[int]:
    """
    For each conversation, how many tokens of its first prompt it shares with the one before it in its row.

    Prompts `[1, 2, 3]`, `[4]` and `[1, 2, 5]` are sorted to `[1, 2, 3]`, `[1, 2, 5]`, `[4]`, so that the result is
    `[0, 0, 2]`: the third conversation finds two tokens of its prompt in the row. A full row starts a new one.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].astype(">u4").tobytes())
    shared, row_tokens, previous = [0] * len(prompts), 0, None
    for index in order:
        length = common_length(prompts[previous], prompts[index]) if previous is not None else 0
        if row_tokens + lengths[index] - length > ROW_TOKENS:
            row_tokens, length = 0, 0
        shared[index] = length
        row_tokens, previous = row_tokens + lengths[index] - length, index
    return shared
