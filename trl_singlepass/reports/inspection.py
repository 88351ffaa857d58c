"""One conversation, looked at token by token: who is trained, with what weight, shared by whom. For the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree, sample_paths
from ..trees.rows import TreePlan
from ..trees.sample import Sample


SYSTEM, USER, TOOL, HISTORY, REASONING, ANSWER = "system", "user", "tool", "history", "reasoning", "answer"
ROLES = (SYSTEM, USER, TOOL, HISTORY, REASONING, ANSWER)
_STYLES = {SYSTEM: "magenta", USER: "cyan", TOOL: "blue", HISTORY: "dim", REASONING: "yellow", ANSWER: "green"}
# How templates name roles: as a special token (<|user|>), or as text after one that starts a message.
_ROLE_WORDS = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "tool": TOOL,
    "observation": TOOL,
    "tool_response": TOOL,
    "tool_outputs_begin": TOOL,
    "assistant": HISTORY,
    "chatbot": HISTORY,
    "model": HISTORY,
}
_STARTS = ("start", "turn", "header")
_HEADER = 12  # tokens after a special token in which a role can be spelled
_CLIP = 300


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """
    One conversation as its prefix tree, with what each token is. Arrays have shape `(num_tokens,)`, in layout order.

    Args:
        samples (`tuple[Sample, ...]`):
            Its turns.
        tree ([`PrefixTree`]):
            Their tree.
        plan ([`TreePlan`]):
            Runs of the layout.
        paths (`tuple[numpy.ndarray, ...]`):
            For each turn, the positions of its tokens.
        texts (`tuple[str, ...]`):
            Text of each token.
        roles (`tuple[str, ...]`):
            `"system"`, `"user"`, `"tool"` or `"history"` in prompts, as far as special tokens tell; `"reasoning"` or
            `"answer"` in completions.
        targets (`tuple[str | None, ...]`):
            Text of what each token must predict, if it must.
        weights (`numpy.ndarray` of `numpy.float64`):
            Weight of predicting each token from the one before it on its path; 0 where it is not trained.
    """

    samples: tuple[Sample, ...]
    tree: PrefixTree
    plan: TreePlan
    paths: tuple[NDArray[np.int64], ...]
    texts: tuple[str, ...]
    roles: tuple[str, ...]
    targets: tuple[str | None, ...]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, samples: Sequence[Sample], tokenizer: Any) -> Inspection:
        """Look at the samples of one conversation."""
        tree = PrefixTree.from_samples(samples)
        plan = TreePlan.from_subtree_end(tree.subtree_end)
        paths = sample_paths(tree, samples)
        get_text = {token: tokenizer.decode([token]) for token in np.unique(tree.input_ids).tolist()}
        texts = tuple(get_text[token] for token in tree.input_ids.tolist())
        roles = _roles(tree, plan, texts, set(tokenizer.added_tokens_decoder))
        for sample, path in zip(samples, paths, strict=True):
            reasoning_end = sample.prompt_length + sample.reasoning_length
            for start, end, role in ((sample.prompt_length, reasoning_end, REASONING), (reasoning_end, None, ANSWER)):
                for position in path[start:end]:
                    roles[position] = role
        targets = tuple(get_text.get(label) for label in [*tree.labels[1:].tolist(), IGNORE_INDEX])
        weights = incoming_weights(tree, plan)
        return cls(tuple(samples), tree, plan, tuple(paths), texts, tuple(roles), targets, weights)

    def turns_through(self, position: int) -> list[int]:
        """Return the numbers (from 1) of the turns that pass through a token."""
        return [turn for turn, path in enumerate(self.paths, start=1) if position in path]


def incoming_weights(tree: PrefixTree, plan: TreePlan) -> NDArray[np.float64]:
    """Return the weight with which each token is predicted from the token before it on its path."""
    # `labels` are rolled along the layout: the target of the last token before a fork lies just after that token.
    source = np.arange(len(tree))
    for run in plan.runs[1:]:
        source[run.start] = run.prefix[-1][1] if run.prefix else 0
    trained = tree.labels[source] == tree.input_ids
    weights: NDArray[np.float64] = np.where(trained, tree.loss_weights[source], 0.0)
    return weights


def _roles(tree: PrefixTree, plan: TreePlan, texts: Sequence[str], added: set[int]) -> list[str]:
    roles = [HISTORY] * len(tree)
    for run in plan.runs:
        role = roles[run.prefix[-1][1] - 1] if run.prefix else HISTORY
        for position in range(run.start, run.end):
            if int(tree.input_ids[position]) in added:
                role = _named_role(texts, position, min(position + 1 + _HEADER, run.end)) or role
            roles[position] = role
    return roles


def _named_role(texts: Sequence[str], position: int, end: int) -> str | None:
    """Role that a special token names, or that is written after one that starts a message."""
    own = re.sub(r"[^a-z]+", "_", texts[position].lower()).strip("_").removesuffix("_token")
    if texts[position].startswith("</"):
        return None
    if not any(word in own for word in _STARTS):
        return _ROLE_WORDS.get(own)
    after = "".join(texts[position + 1 : end]).lower()
    return next((role for word, role in _ROLE_WORDS.items() if after.startswith(word)), None)


def render(inspection: Inspection) -> RenderableType:
    """
    Return a conversation's tree as what `rich` prints. Text of the conversation is shown literally.

    Args:
        inspection (`Inspection`):
            The conversation.

    Returns:
        `rich.console.RenderableType`: A headline, a legend and the tree with one node per segment.
    """
    tree = inspection.tree
    headline = Text(
        f"{len(inspection.samples)} turns, {tree.num_sample_tokens:,} tokens as separate samples, {len(tree):,} as a "
        f"tree: sharing factor {tree.sharing_factor:.2f}",
        style="bold",
    )
    legend = Text.assemble(*((f" {role} ", f"{_STYLES[role]} reverse") for role in ROLES))
    legend.append("  trained tokens are underlined", style="underline")
    root = Tree(Text("conversation", style="bold"), guide_style="dim")
    nodes: dict[int, Tree] = {-1: root}
    for index, segment in enumerate(tree.segments):
        nodes[index] = nodes[segment.parent].add(_segment(inspection, segment.start, segment.end, segment.depth))
    return Group(headline, legend, root)


def _segment(inspection: Inspection, start: int, end: int, depth: int) -> RenderableType:
    turns = inspection.turns_through(start)
    shared = f"shared by turns {_ranges(turns)}" if len(turns) > 1 else f"turn {turns[0]} only"
    trained = inspection.weights[start:end] > 0
    weights = sorted(set(inspection.weights[start:end][trained].tolist()))
    what = f"{int(trained.sum())} trained, weight {_span(weights)}" if weights else "context"
    ends = [turn for turn in turns if inspection.paths[turn - 1][-1] == end - 1]
    title = Text(f"{end - start} tokens at depth {depth}, {shared}: {what}", style="bold" if weights else "")
    if ends:
        title.append(f"; turn {_ranges(ends)} ends here", style="bold green")
    return Group(title, _clipped(inspection, start, end))


def _clipped(inspection: Inspection, start: int, end: int) -> Text:
    text = Text(overflow="fold")
    for position, piece in _visible(inspection, start, end):
        role = _STYLES[inspection.roles[position]]
        text.append(piece, style=f"{role} underline" if inspection.weights[position] > 0 else role)
    return text


def _visible(inspection: Inspection, start: int, end: int) -> Iterator[tuple[int, str]]:
    """Beginning and end of a segment, with what is between left out; line breaks are shown as a sign."""
    pieces = [inspection.texts[position].replace("\n", "⏎") for position in range(start, end)]
    lengths = np.cumsum([len(piece) for piece in pieces])
    total, half = int(lengths[-1]), _CLIP // 2
    skipped = False
    for offset, piece in enumerate(pieces):
        if total <= _CLIP or lengths[offset] <= half or lengths[offset] > total - half:
            yield start + offset, piece
        elif not skipped:
            skipped = True
            yield start + offset, " … "


def _ranges(numbers: Sequence[int]) -> str:
    """`[1, 2, 3, 5]` to `1-3, 5`."""
    borders = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    groups = [numbers[start:end] for start, end in pairwise(borders)]
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)


def _span(weights: Sequence[float]) -> str:
    return f"{weights[0]:g}" if len(weights) == 1 else f"{weights[0]:g} to {weights[-1]:g}"
