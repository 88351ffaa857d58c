"""
Padded lines on trees: the completions of a batch, as TRL lays them out, become rows that share their prefixes.

Shape letters: N lines of T tokens, padded on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, starmap

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..data.collator import DataCollatorForSinglePass
from ..data.row_tree import LineView
from ..engine.enable import without_adapters
from ..engine.model_call import has_fused_head, takes_trees
from ..trees.image_features import to_keys
from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree, sample_paths
from ..trees.rows import Row
from ..trees.sample import Sample
from ..trees.shared_array import common_prefix_length
from ..trees.splitting import split_samples
from .images import LineImages


@dataclass(frozen=True, eq=False)
class PaddedLines:
    """Lines as TRL lays them out: prompts padded on the left, completions on the right."""

    input_ids: torch.Tensor  # (N, T), int64
    attention_mask: torch.Tensor  # (N, T): 1 for tokens, 0 for padding
    images: LineImages | None = None

    def split(self, size: int) -> list[PaddedLines]:
        """Return batches of `size` lines."""
        starts = range(0, len(self.input_ids), size)
        parts = zip(torch.split(self.input_ids, size), torch.split(self.attention_mask, size), starts, strict=True)
        shown = self.images
        return [
            PaddedLines(ids, mask, None if shown is None else shown.of_lines(start, start + size))
            for ids, mask, start in parts
        ]

    @property
    def are_without_gaps(self) -> bool:
        """Whether tokens of each line follow one another: models count positions, which a gap would move."""
        mask = self.attention_mask.bool()
        return bool((mask.diff(dim=1).sum(dim=1) - (~mask[:, :1]).sum(dim=1) <= 1).all())

    @property
    def sharing_factor(self) -> float:
        """
        Tokens of all lines ÷ tokens that differ, without building a tree.

        In the order of their tokens, a line shares with the lines before it what it shares with the one right before
        it. A tree has a few more tokens: it repeats the one before a branch, whose target differs.
        """
        keys = to_keys(self.input_ids.cpu().numpy(), None if self.images is None else self.images.features)
        lines = list(map(np.compress, self.attention_mask.bool().cpu().numpy(), keys))
        lines.sort(key=lambda line: line.astype(">i8").tobytes())  # bytes compare as the numbers do
        num_tokens = sum(map(len, lines))
        return num_tokens / (num_tokens - sum(starmap(common_prefix_length, pairwise(lines))))

    def collator(self, collator: DataCollatorForSinglePass) -> DataCollatorForSinglePass:
        """Return a collator of their rows: the one given, loading their images."""
        return collator if self.images is None else replace(collator, load_images=self.images.load)

    def merge(
        self, is_scored: torch.Tensor, collator: DataCollatorForSinglePass, max_row_tokens: int | None = None
    ) -> tuple[LineView, torch.Tensor]:
        """
        Merge the lines on trees; a line that is longer than a row raises `ValueError`.

        Returns a view, whose `targets`, `(N, T - 1)`, name the position that predicts token `i + 1` of each line, and
        labels, `(N, T)`: the tokens that `is_scored` marks, but for padding and images, and -100 elsewhere.
        """
        is_scored = is_scored.bool() & self.attention_mask.bool()
        if self.images is not None:
            is_scored &= torch.from_numpy(self.images.features < 0).to(is_scored.device)
        tokens, is_token, scored = (x.cpu().numpy() for x in (self.input_ids, self.attention_mask.bool(), is_scored))
        samples = list(map(_sample, tokens, is_token, scored))
        if self.images is not None:
            shown, features = self.images.references, map(np.compress, is_token, self.images.features)
            both = zip(samples, features, strict=True)
            samples = [replace(sample, image_features=own, images=shown) for sample, own in both]
        targets = np.zeros((len(samples), tokens.shape[1] - 1), np.int64)
        rows, first, start = [], 0, 0
        for part in split_samples(samples, max_row_tokens):
            tree = PrefixTree.from_samples(part)
            of_part = slice(first, first + len(part))
            _find_targets(tree, part, is_token[of_part], scored[of_part], targets[of_part], start)
            rows.append(collator([Row.from_tree(tree).columns()]))
            first, start = first + len(part), start + rows[-1]["labels"].shape[1]
        view = LineView(rows, torch.from_numpy(targets)).to(self.input_ids.device)
        return view, self.input_ids.masked_fill(~is_scored, IGNORE_INDEX)


def _sample(tokens: NDArray[np.int64], is_token: NDArray[np.bool_], is_scored: NDArray[np.bool_]) -> Sample:
    weights = is_scored[is_token].astype(np.float64)
    weights[0] = 0  # nothing predicts the first token
    prompt_length = int(weights.argmax()) if weights.any() else len(weights)
    return Sample(tokens[is_token], weights, prompt_length)


def _find_targets(
    tree: PrefixTree,
    samples: Sequence[Sample],
    is_token: NDArray[np.bool_],
    is_scored: NDArray[np.bool_],
    targets: NDArray[np.int64],
    start: int,
) -> None:
    """Write where in the rows each scored token is predicted; `start` is the position of the tree's first token."""
    for path, of_line, scored, line in zip(sample_paths(tree, samples), is_token, is_scored, targets, strict=True):
        at = np.flatnonzero(of_line)[1:]  # of every token but the first, which the one before it predicts
        line[at - 1] = np.where(scored[at], start + path[:-1], 0)


def tree_log_probs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    max_row_tokens: int | None = None,
) -> torch.Tensor:
    """
    Return the log-probabilities of completions, computed on one prefix tree: shared prefixes run once.

    They equal those of separate forwards, and so do their gradients. With TRL's `add_fused_lm_head`, called before
    [`enable_tree`], logits are never built.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model on which [`enable_tree`] was called.
        input_ids (`torch.Tensor` of shape `(batch, length)`, `torch.int64`):
            Prompts and completions, padded on either side or both.
        attention_mask (`torch.Tensor` of shape `(batch, length)`):
            1 for tokens, 0 for padding.
        completion_mask (`torch.Tensor` of shape `(batch, length)`):
            1 for the tokens whose log-probabilities are asked for. Others, such as results of tools, are context.
        max_row_tokens (`int`, *optional*):
            Largest row, in tokens. `None` makes one row of the batch.

    Returns:
        `torch.Tensor` of shape `(batch, length - 1)`: The log-probability of each token but the first, given those
        before it; 0 where `completion_mask` is 0.

    Raises:
        `ValueError`: If the model takes no trees, a mask has gaps, or a line is longer than a row.
    """
    base = without_adapters(model)
    if not takes_trees(base):
        raise ValueError("The model takes no trees, and would run each line as it is. Call enable_tree(model) first.")
    padded = PaddedLines(input_ids, attention_mask)
    if not padded.are_without_gaps:
        raise ValueError("attention_mask has gaps between the tokens of a line. Move its tokens together.")
    view, labels = padded.merge(completion_mask, DataCollatorForSinglePass(pad_token_id=0), max_row_tokens)
    if has_fused_head(base):
        log_probs: torch.Tensor = model(input_ids=input_ids, labels=labels, tree=view, fused_lm_head=True).log_probs
        return log_probs
    logits: torch.Tensor = model(input_ids=input_ids, tree=view).logits
    targets = labels[:, 1:, None]
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, targets.clamp(min=0))
    return chosen.masked_fill(targets == IGNORE_INDEX, 0)[..., 0]
