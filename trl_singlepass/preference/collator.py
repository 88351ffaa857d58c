"""
From rows of pairs to the batch that TRL's DPO reads, with the tree that the model runs on beside it.

Shape letters: B pairs, M trained tokens of the longest trajectory, L tokens of the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.collator import Batch, DataCollatorForSinglePass
from .rows import LENGTH_COLUMNS, POSITION_COLUMNS
from .turn_weights import TurnWeights


REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class DataCollatorForSinglePassPreference:
    """
    Join the pairs of a batch into one padding-free row, and lay out what TRL's DPO reads of it.

    DPO reads trajectories, one per line, chosen ones first: `input_ids` of shape `(2B, M + 1)` hold the tokens that
    log π is taken over, behind one token that stands for everything before them. The model never sees them; it runs on
    `row`, and `targets` says where in the row each of them is predicted.

    Args:
        pad_token_id (`int`):
            Token that pads trajectories, and the row to a multiple of `pad_to_multiple_of`.
        pad_to_multiple_of (`int`, *optional*):
            If set, the length of the row is a multiple of this number of tokens.
        turn_weights (`TurnWeights`, *optional*):
            Factors of the log-probabilities of turns; all 1 by default.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    turn_weights: TurnWeights = field(default_factory=TurnWeights)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """
        Collate pairs.

        Args:
            examples (`Sequence[Mapping[str, Any]]`):
                Pairs, with `PAIR_COLUMNS`, and `REFERENCE_COLUMNS` if they have been computed.

        Returns:
            `Batch`: `input_ids`, `completion_mask` (`torch.int64` of shape `(2B, M + 1)`); `attention_mask`, the
            multiplicity of each token of the row, `(1, L)`; `targets`, `(2B, M)`, the position in the row that
            predicts each token, 0 where there is none; `row`, the batch of [`DataCollatorForSinglePass`];
            `token_weights`, `torch.float32` of shape `(2B, M)`, where turns have weights; `REFERENCE_COLUMNS`, if the
            examples have them.
        """
        row = DataCollatorForSinglePass(self.pad_token_id, self.pad_to_multiple_of)(examples)
        starts = np.cumsum([0] + [len(example["input_ids"]) for example in examples[:-1]])
        positions = [
            torch.from_numpy(start + np.asarray(example[side], np.int64))
            for side in POSITION_COLUMNS
            for start, example in zip(starts, examples, strict=True)
        ]
        targets = pad_sequence(positions, batch_first=True)
        mask = pad_sequence([torch.ones_like(line) for line in positions], batch_first=True)
        tokens = torch.where(mask.bool(), row["labels"][0, 1:][targets], self.pad_token_id)
        batch = {
            "input_ids": torch.nn.functional.pad(tokens, (1, 0), value=self.pad_token_id),
            "completion_mask": torch.nn.functional.pad(mask, (1, 0)),
            "attention_mask": row["attention_mask"],
            "targets": targets,
            "row": row,
        }
        if not self.turn_weights.are_all_one:
            lines = [example[side] for side in LENGTH_COLUMNS for example in examples]
            weights = [torch.from_numpy(self.turn_weights.of_tokens(lengths)).float() for lengths in lines]
            batch["token_weights"] = pad_sequence(weights, batch_first=True)
        for name in REFERENCE_COLUMNS:
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch
