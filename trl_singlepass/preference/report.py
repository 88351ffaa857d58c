"""What a dataset of pairs held, and what is not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..data.bad_rows import RowErrors, describe_dropped
from .pairs import Pair
from .settings import PairSettings


COUNT_COLUMNS = (
    "num_turns",
    "num_shared_turns",
    "num_equal_pairs",
    "num_turns_without_prompt",
    "num_unselected_turns",
    "num_empty_blocks",
    "num_trained_tokens",
    "num_cut_turns",
    "num_dropped_turns",
    "num_cut_tokens",
    "num_dropped_pairs",
    "num_sample_tokens",
    "num_tokens",
    "num_split_pairs",
    "num_rows",
)


def count_pair(pair: Pair, num_tokens: int, num_rows: int = 0) -> dict[str, int]:
    """
    Return `COUNT_COLUMNS` of one pair. It needs `num_tokens` tokens of `num_rows` rows, 0 tokens if it is dropped.
    """
    sides, is_dropped = pair.sides, num_tokens == 0
    turns = ("num_turns_without_prompt", "num_unselected_turns", "num_empty_blocks", "num_cut_turns")
    summed = (*turns, "num_dropped_turns", "num_cut_tokens")
    return {
        **{name: sum(getattr(side, name) for side in sides) for name in summed},
        "num_turns": sum(len(side.samples) + side.num_dropped_turns + side.num_unselected_turns for side in sides),
        "num_shared_turns": pair.num_shared_turns,
        "num_equal_pairs": int(pair.num_shared_turns == len(pair.chosen.samples) == len(pair.rejected.samples)),
        "num_trained_tokens": 0 if is_dropped else sum(side.num_trained_tokens for side in sides),
        "num_dropped_pairs": int(is_dropped),
        "num_sample_tokens": 0 if is_dropped else sum(map(len, pair.samples)),
        "num_tokens": num_tokens,
        "num_split_pairs": int(num_rows > 1),
        "num_rows": num_rows if num_rows > 1 else 0,
    }


@dataclass(frozen=True, slots=True)
class PairReport:
    """What a dataset of pairs held, and what is not trained."""

    num_pairs: int  # without bad rows
    counts: Mapping[str, int]  # sums of `COUNT_COLUMNS`
    bound: str = "max_length"  # name of the setting that bounds a turn
    bad_rows: tuple[RowErrors, ...] = ()  # rows that cannot be trained and were dropped, by reason

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, Sequence[int]], settings: PairSettings, bad_rows: tuple[RowErrors, ...] = ()
    ) -> PairReport:
        """Return the report on prepared pairs, from `COUNT_COLUMNS` with one value per row, bad rows among them."""
        counts = {name: sum(columns[name]) for name in COUNT_COLUMNS}
        num_pairs = len(columns["num_turns"]) - sum(errors.count for errors in bad_rows)
        return cls(num_pairs, counts, settings.for_trajectory().bound or "max_length", bad_rows)

    def __add__(self, other: PairReport) -> PairReport:
        """Return the report on both parts of a dataset."""
        counts = {name: self.counts[name] + other.counts[name] for name in COUNT_COLUMNS}
        return PairReport(self.num_pairs + other.num_pairs, counts, self.bound, self.bad_rows + other.bad_rows)

    @property
    def is_complete(self) -> bool:
        """Whether every token of every turn of every row counts."""
        counts = self.counts
        return not (counts["num_cut_tokens"] or counts["num_turns_without_prompt"] or self.bad_rows)

    def __str__(self) -> str:
        counts = self.counts
        parts = [f"{counts['num_turns']} turns of {self.num_pairs} pairs"]
        if self.bad_rows:
            parts.insert(0, describe_dropped(self.bad_rows))
        if counts["num_turns_without_prompt"]:
            parts.append(f"{counts['num_turns_without_prompt']} assistant messages before any prompt are context only")
        if counts["num_unselected_turns"]:
            parts.append(f"{counts['num_unselected_turns']} of them context only, by weight or train_turns")
        if counts["num_empty_blocks"]:
            parts.append(f"{counts['num_empty_blocks']} turns without reasoning, which train an empty block of it")
        if counts["num_shared_turns"]:
            parts.append(f"{counts['num_shared_turns']} in an equal context on both sides, where they cancel")
        if counts["num_equal_pairs"]:
            parts.append(f"{counts['num_equal_pairs']} pairs whose trajectories are equal, so they prefer nothing")
        parts.append(self._trained())
        if counts["num_split_pairs"]:
            parts.append(
                f"{counts['num_split_pairs']} pairs larger than max_row_tokens take {counts['num_rows']} rows"
            )
        if counts["num_tokens"]:
            parts.append(f"sharing factor {counts['num_sample_tokens'] / counts['num_tokens']:.2f}")
        return "; ".join(parts)

    def _trained(self) -> str:
        counts = self.counts
        if not counts["num_cut_tokens"]:
            return f"all {counts['num_trained_tokens']} completion tokens count"
        return (
            f"{counts['num_trained_tokens']} completion tokens count, {counts['num_cut_tokens']} past {self.bound} do "
            f"not: {counts['num_cut_turns']} turns are cut, {counts['num_dropped_turns']} left out whole, "
            f"{counts['num_dropped_pairs']} pairs dropped since a side has nothing left"
        )
