"""What training costs by each schedule, and what other recipes would train of the same conversations: numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...cost.flops import ONE_LAYER, Cost, ModelShape, npass_cost, prefix_cost, single_pass_cost
from ...rendering.conversation import Conversation
from ...rendering.reasoning import ParsedMessage, reasoning_tags
from ...rendering.tokenization import common_length
from ...trees.image_features import to_keys
from ...trees.prefix_tree import lay_out
from ...trees.radix import RadixNode, SampleMerger
from ...trees.sample import Sample


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_TOKENS = 32_768
# A smaller gain drowns in the noise of kernels, padding and data loading.
WORTHWHILE = 1.1
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

    @property
    def verdict(self) -> str:
        """What the numbers mean, in a sentence or two."""
        gain, what = self.over_npass.value, "work" if self.has_model else "tokens"
        over_chains, in_all = self.over_chains.value, self.shared_over_npass.value
        sharing = ""
        if in_all / gain >= WORTHWHILE:
            sharing = f" Packing conversations that begin alike saves more: {in_all:.2f} × in all."
        if gain < WORTHWHILE:
            return (
                f"A single pass saves too little to matter here: N separate samples take {gain:.2f} × its {what}. "
                f"It is still exact.{sharing}"
            )
        if over_chains < WORTHWHILE:
            return (
                f"A single pass saves {1 - 1 / gain:.0%} of the {what} of N separate samples, but too little to "
                f"matter compared with {Schedule.CHAINS} ({over_chains:.2f} ×).{sharing}"
            )
        return (
            f"A single pass saves {1 - 1 / gain:.0%} of the {what} of N separate samples: expect up to {gain:.2f} × "
            f"the speed, and up to {over_chains:.2f} × that of {Schedule.CHAINS}.{sharing}"
        )


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


class Recipe(StrEnum):
    """A common way to train multi-turn conversations."""

    ASSISTANT_ONLY = "TRL assistant_only_loss"
    LAST_TURN = "last turn only"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeReport:
    """Tokens that a recipe trains of the trainable conversations it can be applied to."""

    completion_tokens: int = 0  # of all turns, each in its own context: what there is to train
    reasoning_tokens: int = 0  # completion tokens that are reasoning
    trained_tokens: int = 0
    unlike_inference: int = 0  # trained tokens that the model would not write itself, or not in this context
    reasoning_not_trained: int = 0  # reasoning tokens that are trained in no context
    name: Recipe
    conversations: int = 0  # that it can be applied to
    refusal: str | None = None  # why it cannot be applied to the others, or to any

    @classmethod
    def from_samples(
        cls, name: Recipe, samples: Sequence[Sample], *, trained: int, unlike_inference: int, not_trained: int
    ) -> RecipeReport:
        """Report on one conversation, given the numbers of tokens that the recipe trains of it, and does not."""
        return cls(
            completion_tokens=sum(len(sample) - sample.prompt_length for sample in samples),
            reasoning_tokens=sum(sample.reasoning_length for sample in samples),
            trained_tokens=trained,
            unlike_inference=unlike_inference,
            reasoning_not_trained=not_trained,
            name=name,
            conversations=1,
        )

    @classmethod
    def merge(cls, name: Recipe, reports: Iterable[RecipeReport], refusal: str | None = None) -> RecipeReport:
        """Add up the reports on a recipe, with a refusal of all conversations or the first of a single one."""
        own = [report for report in reports if report.name == name]
        counts = {key: sum(getattr(report, key) for report in own) for key in _COUNTS}
        return cls(name=name, refusal=refusal or next((one.refusal for one in own if one.refusal), None), **counts)


_COUNTS = tuple(one.name for one in fields(RecipeReport) if one.name not in ("name", "refusal"))


def count_last_turn(samples: Sequence[Sample]) -> RecipeReport:
    """Count what training only the last turn of a conversation trains."""
    *others, last = samples
    return RecipeReport.from_samples(
        Recipe.LAST_TURN,
        samples,
        trained=len(last) - last.prompt_length,
        unlike_inference=0,
        not_trained=sum(sample.reasoning_length for sample in others),
    )


class AssistantOnlyLoss:
    """TRL's `assistant_only_loss=True`: the conversation as one sequence, rendered with TRL's training template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from trl.chat_template_utils import get_training_chat_template

        self.tokenizer = tokenizer
        self.refusal: str | None = None
        self.chat_template: str | None = None
        try:
            if "{% generation %}" not in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}"):
                self.chat_template = get_training_chat_template(tokenizer)
        except ValueError:
            self.refusal = "TRL has no training template for this chat template"

    def count(self, conversation: Conversation, samples: Sequence[Sample]) -> RecipeReport:
        """Count what the recipe trains of a conversation."""
        if conversation.images is not None:
            return RecipeReport(name=Recipe.ASSISTANT_ONLY, refusal="it is not counted for conversations with images")
        if self.refusal is not None:
            return RecipeReport(name=Recipe.ASSISTANT_ONLY, refusal=self.refusal)
        try:
            return self._count(conversation, samples)
        except Exception as error:  # TRL's training templates refuse some rows that the stock ones render
            return RecipeReport(name=Recipe.ASSISTANT_ONLY, refusal=str(error) or type(error).__name__)

    def _count(self, conversation: Conversation, samples: Sequence[Sample]) -> RecipeReport:
        token_ids, trained = self._tokenize(conversation)
        exact = _trained_as_served(token_ids, samples)
        if conversation.first_trained:  # TRL masks the prompt of a prompt-completion example
            prompt, _ = self._tokenize(conversation, conversation.first_trained)
            trained[: common_length(token_ids, prompt)] = False
        tags = reasoning_tags(self.tokenizer.chat_template)
        indices = [sample.message_index for sample in samples if sample.message_index is not None]
        parsed = [ParsedMessage.from_message(conversation.messages[index], tags) for index in indices]
        return RecipeReport.from_samples(
            Recipe.ASSISTANT_ONLY,
            samples,
            trained=int(trained.sum()),
            unlike_inference=int((trained & ~exact).sum()),
            not_trained=_missing_reasoning(self._decode(token_ids, trained), parsed, samples),
        )

    def _tokenize(
        self, conversation: Conversation, num_messages: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        encoded = self.tokenizer.apply_chat_template(
            conversation.messages[:num_messages],
            tools=conversation.tools,
            chat_template=self.chat_template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **conversation.template_kwargs,
        )
        return np.asarray(encoded["input_ids"], np.int64), np.asarray(encoded["assistant_masks"], bool)

    def _decode(self, token_ids: NDArray[np.int64], trained: NDArray[np.bool_]) -> str:
        """Text of all contiguous trained ranges, one per line."""
        borders = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
        return "\n".join(self.tokenizer.decode(token_ids[start:end].tolist()) for start, end in borders)


def _trained_as_served(token_ids: NDArray[np.int64], samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """Return which tokens of a sequence some sample trains after the same tokens."""
    trained = np.zeros(len(token_ids), bool)
    previous: Sample | None = None
    shared = 0
    for sample in samples:
        known = 0 if previous is None else sample.tokens.shared_length(previous.tokens)
        if shared >= known:  # what this sample shares with the one before is in the sequence, too
            shared = known + common_length(token_ids[known:], sample.tokens.tail(known))
        kept = sample.weights.kept
        trained[kept:shared] |= sample.weights.own[: max(shared - kept, 0)] > 0
        previous = sample
    return trained


def _missing_reasoning(text: str, parsed: Sequence[ParsedMessage], samples: Sequence[Sample]) -> int:
    missing, position = 0, 0
    for turn, sample in zip(parsed, samples, strict=True):
        found = text.find(turn.reasoning.strip(), position)
        if found < 0:
            missing += sample.reasoning_length
        else:
            position = found + len(turn.reasoning.strip())
    return missing
