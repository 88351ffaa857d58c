"""One conversation token by token: what is trained, with what weight, and which turns share it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from ..data.bad_rows import count_of
from ..trees.errors import printable
from ..trees.image_features import image_of_feature
from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree, sample_paths
from ..trees.rows import TreePlan
from ..trees.sample import Sample


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenRole(StrEnum):
    """What a token is part of; earlier assistant messages are history."""

    SYSTEM = "system"
    USER = "user"
    TOOL = "tool"
    HISTORY = "history"
    REASONING = "reasoning"
    ANSWER = "answer"


_STYLES = {
    TokenRole.SYSTEM: "magenta",
    TokenRole.USER: "cyan",
    TokenRole.TOOL: "blue",
    TokenRole.HISTORY: "dim",
    TokenRole.REASONING: "yellow",
    TokenRole.ANSWER: "green",
}
_SIDE_STYLES = {"chosen": "green", "rejected": "red"}
# Templates name a role by a special token (<|user|>), or in the text after a token that starts a message.
_ROLE_WORDS = {
    "system": TokenRole.SYSTEM,
    "developer": TokenRole.SYSTEM,
    "user": TokenRole.USER,
    "tool": TokenRole.TOOL,
    "observation": TokenRole.TOOL,
    "tool_response": TokenRole.TOOL,
    "tool_outputs_begin": TokenRole.TOOL,
    "assistant": TokenRole.HISTORY,
    "chatbot": TokenRole.HISTORY,
    "model": TokenRole.HISTORY,
}
_STARTS = ("start", "turn", "header")
_HEADER = 12  # tokens after a special token that may spell a role
_MAX_CHARACTERS = 300  # shown of a segment in the terminal


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """One conversation as a prefix tree. Arrays and tuples by token have length `num_tokens`, in layout order."""

    samples: tuple[Sample, ...]  # its turns
    tree: PrefixTree
    plan: TreePlan
    paths: tuple[NDArray[np.int64], ...]  # positions of the tokens of each turn
    texts: tuple[str, ...]  # of each token; of an image, its number at its first token and nothing at the others
    roles: tuple[TokenRole, ...]  # what each token is part of; in prompts, as far as special tokens tell
    targets: tuple[str | None, ...]  # text that each token has to predict; `None` if it has no target
    num_chosen: int | None = None  # of a pair, how many turns belong to the chosen trajectory, which comes first

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, num_chosen: int | None = None
    ) -> Inspection:
        """Inspect the samples of one conversation, or of a pair of which the first `num_chosen` are preferred."""
        tree = PrefixTree.from_samples(samples)
        plan = TreePlan.from_subtree_end(tree.subtree_end)
        paths = sample_paths(tree, samples)
        token_texts = {token: tokenizer.decode([token]) for token in np.unique(tree.input_ids).tolist()}
        texts = _with_images_named([token_texts[token] for token in tree.input_ids.tolist()], tree)
        roles = _roles(tree, plan, texts, set(tokenizer.added_tokens_decoder))
        for sample, path in zip(samples, paths, strict=True):
            reasoning_end = sample.prompt_length + sample.reasoning_length
            for position in path[sample.prompt_length : reasoning_end]:
                roles[position] = TokenRole.REASONING
            for position in path[reasoning_end:]:
                roles[position] = TokenRole.ANSWER
        targets = tuple(token_texts.get(label) for label in [*tree.labels[1:].tolist(), IGNORE_INDEX])
        return cls(tuple(samples), tree, plan, tuple(paths), texts, tuple(roles), targets, num_chosen)

    @property
    def summary(self) -> str:
        """Number of turns and tokens, in a line."""
        turns = count_of(len(self.samples), "turn")
        if self.num_chosen is not None:
            num_rejected = len(self.samples) - self.num_chosen
            turns = f"{self.num_chosen:,} chosen and {count_of(num_rejected, 'rejected turn')}"
        return (
            f"{turns}, {count_of(self.tree.num_sample_tokens, 'token')} as separate samples, "
            f"{len(self.tree):,} as a tree: sharing factor {self.tree.sharing_factor:.2f}"
        )

    def side(self, turn: int) -> str | None:
        """Return which trajectory of a pair a turn (from 1) belongs to: `"chosen"` or `"rejected"`."""
        if self.num_chosen is None:
            return None
        return "chosen" if turn <= self.num_chosen else "rejected"

    def turns_through(self, position: int) -> list[int]:
        """Return the numbers (from 1) of the turns that pass through a token."""
        return [turn for turn, path in enumerate(self.paths, start=1) if position in path]


def _with_images_named(texts: list[str], tree: PrefixTree) -> tuple[str, ...]:
    """Return the texts of tokens with the number of each image in the place of its placeholders."""
    if tree.image_features is None:
        return tuple(texts)
    owners = image_of_feature(tree.images)
    for position in np.flatnonzero(tree.image_features >= 0).tolist():
        feature = int(tree.image_features[position])
        is_first = feature == 0 or owners[feature - 1] != owners[feature]
        texts[position] = f"[image {owners[feature] + 1}]" if is_first else ""
    return tuple(texts)


def _roles(tree: PrefixTree, plan: TreePlan, texts: Sequence[str], added: set[int]) -> list[TokenRole]:
    roles = [TokenRole.HISTORY] * len(tree)
    for run in plan.runs:
        role = roles[run.prefix[-1][1] - 1] if run.prefix else TokenRole.HISTORY
        for position in range(run.start, run.end):
            if int(tree.input_ids[position]) in added:
                role = _named_role(texts, position, min(position + 1 + _HEADER, run.end)) or role
            roles[position] = role
    return roles


def _named_role(texts: Sequence[str], position: int, end: int) -> TokenRole | None:
    """Role that a special token names, or that follows a token that starts a message."""
    own = re.sub(r"[^a-z]+", "_", texts[position].lower()).strip("_").removesuffix("_token")
    if texts[position].startswith("</"):
        return None
    if not any(word in own for word in _STARTS):
        return _ROLE_WORDS.get(own)
    after = "".join(texts[position + 1 : end]).lower()
    return next((role for word, role in _ROLE_WORDS.items() if after.startswith(word)), None)


def render_inspection(inspection: Inspection) -> RenderableType:
    """Return the tree of a conversation for `rich` to print. Text of the conversation appears literally."""
    tree = inspection.tree
    headline = Text(inspection.summary, style="bold")
    legend = Text.assemble(*((f" {role} ", f"{_STYLES[role]} reverse") for role in TokenRole))
    legend.append("  trained tokens are underlined", style="underline")
    root = Tree(Text("conversation", style="bold"), guide_style="dim")
    nodes: dict[int, Tree] = {-1: root}
    for index, segment in enumerate(tree.segments):
        nodes[index] = nodes[segment.parent].add(_segment(inspection, segment.start, segment.end, segment.depth))
    return Group(headline, legend, root)


def _segment(inspection: Inspection, start: int, end: int, depth: int) -> RenderableType:
    turns = inspection.turns_through(start)
    shared = f"shared by turns {_format_numbers(turns)}" if len(turns) > 1 else f"turn {turns[0]} only"
    trained = inspection.tree.token_weights[start:end] > 0
    weights = sorted(set(inspection.tree.token_weights[start:end][trained].tolist()))
    shown = " to ".join(f"{weight:g}" for weight in dict.fromkeys((*weights[:1], *weights[-1:])))
    content = f"{int(trained.sum())} trained, weight {shown}" if weights else "context"
    ends = [turn for turn in turns if inspection.paths[turn - 1][-1] == end - 1]
    length = count_of(end - start, "token")
    title = Text(f"{length} at depth {depth}, {shared}: {content}", style="bold" if weights else "")
    sides = {side for turn in turns if (side := inspection.side(turn)) is not None}
    for side in sorted(sides) if weights else []:
        title.append(f" [{side}]", style=f"bold {_SIDE_STYLES[side]}")
    if ends:
        title.append(f"; turn {_format_numbers(ends)} ends here", style="bold green")
    text = Text(overflow="fold")
    for position, piece in _visible_tokens(inspection, start, end):
        role = _STYLES[inspection.roles[position]]
        text.append(piece, style=f"{role} underline" if inspection.tree.token_weights[position] > 0 else role)
    return Group(title, text)


def _visible_tokens(inspection: Inspection, start: int, end: int) -> Iterator[tuple[int, str]]:
    """Start and end of a segment, with the middle left out; line breaks appear as ⏎."""
    pieces = [printable(inspection.texts[position].replace("\n", "⏎")) for position in range(start, end)]
    lengths = np.cumsum([len(piece) for piece in pieces])
    total, half = int(lengths[-1]), _MAX_CHARACTERS // 2
    skipped = False
    for offset, piece in enumerate(pieces):
        if total <= _MAX_CHARACTERS or lengths[offset] <= half or lengths[offset] > total - half:
            yield start + offset, piece
        elif not skipped:
            skipped = True
            yield start + offset, " … "


def consecutive(numbers: Sequence[int] | NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return `[1, 2, 3]` and `[5]` for `[1, 2, 3, 5]`."""
    return np.split(np.asarray(numbers), np.flatnonzero(np.diff(numbers) != 1) + 1)


def _format_numbers(numbers: Sequence[int]) -> str:
    """Return `"1-3, 5"` for `[1, 2, 3, 5]`."""
    return ", ".join("-".join(map(str, dict.fromkeys((part[0], part[-1])))) for part in consecutive(numbers))
