"""
From rows of pairs to the batch that TRL's DPO reads, with the trees that the model runs on beside it.

Shape letters: B pairs, M trained tokens of the longest trajectory, L tokens of all rows of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.utils.rnn import pad_sequence

from ..data.arrow import length_column
from ..data.collator import Batch, DataCollatorForSinglePass
from ..data.labelled_rows import pack_examples, positions_of_lists
from ..data.pairs import REFERENCE_COLUMNS, SIDES
from ..data.row_tree import LineView


@dataclass(frozen=True, slots=True)
class TurnWeights:
    """
    Factors of the log-probabilities of turns.

    With the discount factor γ of DMPO, turn `t` of `T`, counted from 0, has the factor `(1 - γ^(T - t)) / (1 - γ^T)`.
    The first turn always has the factor 1, and later ones less; near 0, all have 1. With `γ = 0.5`, two turns have
    `(1, 2/3)`.

    With `is_mean`, a turn counts with the mean of its tokens instead of their sum, so that long turns weigh no more
    than short ones.

    Source: DMPO, arXiv 2406.14868 (equation of φ(t, T)).
    """

    discount: float | None = None  # γ, between 0 and 1; no discount if `None`
    is_mean: bool = False

    def __post_init__(self) -> None:
        if self.discount is not None and not 0 < self.discount < 1:
            raise ValueError(f"turn_discount={self.discount}: expected a number between 0 and 1, without either.")

    def of_tokens(self, turn_lengths: ArrayLike | Sequence[int]) -> NDArray[np.float64]:
        """Return the factor of each token of a trajectory, `(num_tokens,)`, given the lengths of its turns."""
        lengths = np.asarray(turn_lengths, np.int64)
        factors: NDArray[np.float64] = np.ones(len(lengths))
        if self.discount is not None:
            left = np.arange(len(lengths), 0, -1)  # T - t
            factors *= (1 - self.discount**left) / (1 - self.discount ** len(lengths))
        if self.is_mean:
            factors = factors / np.maximum(lengths, 1)
        return np.repeat(factors, lengths)


@dataclass
class DataCollatorForSinglePassPreference:
    """
    Lay out the pairs of a batch in rows without padding, and what TRL's DPO reads of them.

    DPO reads trajectories, one per line, chosen ones first: `input_ids` of shape `(2B, M + 1)` hold the tokens that
    log π is taken over, behind one token that stands for everything before them. The model never sees them; it runs on
    the rows of `tree`, which says where in the rows each of them is predicted.
    """

    pad_token_id: int  # pads trajectories, and rows to a multiple of `pad_to_multiple_of`
    pad_to_multiple_of: int | None = None
    # factors of the log-probabilities of turns, all 1 by default
    turn_weights: TurnWeights = field(default_factory=TurnWeights)
    max_row_tokens: int | None = None  # capacity of a row (see [`pack_examples`]); `None` makes one row of a batch
    row_collator: DataCollatorForSinglePass = field(init=False)

    def __post_init__(self) -> None:
        self.row_collator = DataCollatorForSinglePass(self.pad_token_id, self.pad_to_multiple_of)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """
        Collate examples with `PAIR_COLUMNS`, and with `REFERENCE_COLUMNS` if they have been computed.

        Returns `input_ids` and `completion_mask`, `(2B, M + 1)`; `attention_mask`, `(1, L)`, the multiplicity of each
        token of the rows; `tree`, a [`LineView`] with one line per trajectory; and `REFERENCE_COLUMNS`.
        """
        packed = pack_examples(examples, SIDES, self.max_row_tokens)
        rows = [self.row_collator([each.row.columns()]) for each in packed]
        labels = torch.cat([torch.nn.functional.pad(row["labels"][0, 1:], (0, 1)) for row in rows])
        of_lists = positions_of_lists(packed, [row["labels"].shape[1] for row in rows])
        positions = [torch.from_numpy(of_lists[line]) for line in product(range(len(SIDES)), range(len(examples)))]
        targets = pad_sequence(positions, batch_first=True)
        mask = pad_sequence([torch.ones_like(line) for line in positions], batch_first=True)
        tokens = torch.where(mask.bool(), labels[targets], self.pad_token_id)
        batch = {
            "input_ids": torch.nn.functional.pad(tokens, (1, 0), value=self.pad_token_id),
            "completion_mask": torch.nn.functional.pad(mask, (1, 0)),
            "attention_mask": torch.cat([row["attention_mask"] for row in rows], dim=1),
            "tree": LineView(rows, targets, self._token_weights(examples)),
        }
        for name in REFERENCE_COLUMNS:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch

    def reading_images_as(self, other: DataCollatorForSinglePassPreference) -> DataCollatorForSinglePassPreference:
        """Return this collator, with rows that read images as those of another one do."""
        self.row_collator = self.row_collator.reading_images_as(other.row_collator)
        return self

    def _token_weights(self, examples: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
        if self.turn_weights == TurnWeights():
            return None
        lines = [example[length_column(side)] for side in SIDES for example in examples]
        weights = [torch.from_numpy(self.turn_weights.of_tokens(lengths)).float() for lengths in lines]
        return pad_sequence(weights, batch_first=True)
