"""Reports: what a dataset held, what is not trained, and how full its rows are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..trees.sample import CompletionKind
from .bad_rows import RowErrors, count_of, describe_dropped
from .rows import COUNTS, KIND_COUNTS, PreparedRow


_NUM_NAMED = 3  # overlong turns that a report names


@dataclass(frozen=True, slots=True)
class Report:
    """What a dataset held, and what is not trained."""

    example: str  # what an example is: "conversation" or "pair"
    bound: str | None  # the setting that bounds a sample
    counts: Mapping[str, int] = field(default_factory=Counter)  # sums of `COUNTS`
    overlong: tuple[str, ...] = ()  # the first few turns that are too long, by name
    bad_rows: tuple[RowErrors, ...] = ()  # dropped because they cannot be trained, by reason

    @classmethod
    def from_table(cls, example: str, bound: str | None, table: pa.Table, bad_rows: tuple[RowErrors, ...]) -> Report:
        """Return the report on rows beside which their `counts`, in the order of `COUNTS`, and `overlong` stand."""
        sums = pc.list_flatten(table["counts"]).to_numpy().reshape(-1, len(COUNTS)).sum(axis=0)
        overlong = table["overlong"].drop_null()[:_NUM_NAMED].to_pylist()
        return cls(example, bound, Counter(dict(zip(COUNTS, sums.tolist(), strict=True))), tuple(overlong), bad_rows)

    def with_rows(self, rows: Iterable[PreparedRow]) -> Report:
        """Return the report on more rows of the same dataset."""
        counts, overlong = Counter(self.counts), list(self.overlong)
        for row in rows:
            counts.update(row.counts)
            if row.overlong is not None:
                overlong.append(row.overlong)
        return replace(self, counts=counts, overlong=tuple(overlong[:_NUM_NAMED]))

    def __getitem__(self, name: str) -> int:
        """Return one of `COUNTS`."""
        return self.counts[name]

    @property
    def kinds(self) -> dict[CompletionKind, int]:
        """Number of turns by how their completions came about, where there are any."""
        return {kind: self[name] for kind, name in KIND_COUNTS.items() if self[name]}

    @property
    def num_bad_rows(self) -> int:
        """Examples that cannot be trained and were dropped."""
        return sum(errors.count for errors in self.bad_rows)

    @property
    def is_complete(self) -> bool:
        """Whether every token of every turn of every example is trained."""
        return not (self["num_cut_tokens"] or self["num_turns_without_prompt"] or self.bad_rows)

    def __str__(self) -> str:
        return "; ".join(filter(None, (*self._held(), self._trained(), self._split(), self._sharing())))

    def _held(self) -> Iterable[str]:
        """Yield what there is to say about the examples."""
        if self.bad_rows:
            yield describe_dropped(self.bad_rows)
        turns, examples = count_of(self["num_turns"], "turn"), count_of(self["num_examples"], self.example)
        yield f"{turns} of {examples}{self._rendered()}"
        if encoded := self["num_row_images"]:
            fewer = self["num_sample_images"] / encoded
            encodings = count_of(encoded, "image encoding")
            yield f"{encodings} instead of {self['num_sample_images']} ({fewer:.1f} times fewer)"
        for name, noun, text in (
            ("num_turns_without_prompt", "assistant message", "before any prompt, context only"),
            ("num_unselected_turns", "", "of them context only, by weight or train_turns"),
            ("num_empty_blocks", "turn", "without reasoning, trained to write an empty block of it"),
            ("num_shared_turns", "", "in an equal context on both sides, cancelling out"),
            ("num_equal_examples", "pair", "of equal trajectories, without effect"),
        ):
            if self[name]:
                yield f"{count_of(self[name], noun) if noun else self[name]} {text}"

    def _rendered(self) -> str:
        """How the turns were rendered, where there is something to say about it."""
        if set(self.kinds) <= {CompletionKind.AS_SERVED, CompletionKind.GIVEN_AS_TOKENS}:
            return ""
        return f" ({', '.join(f'{count} {kind}' for kind, count in self.kinds.items())})"

    def _trained(self) -> str:
        if not self["num_cut_tokens"]:
            trained = "trained" if self.example == "conversation" else "count"  # log π is taken over those of pairs
            return f"all {self['num_trained_tokens']:,} completion tokens {trained}"
        num_others = self["num_cut_turns"] + self["num_dropped_turns"] - len(self.overlong)
        more = f" and {num_others} more" if num_others else ""
        return (
            f"not trained: {self['num_cut_tokens']:,} completion tokens past {self.bound}, in "
            f"{count_of(self['num_cut_turns'], 'turn')} trained in part and "
            f"{count_of(self['num_dropped_turns'], 'turn')} dropped whole "
            f"({count_of(self['num_dropped_examples'], self.example)} dropped whole; "
            f"{', '.join(self.overlong)}{more}), "
            f"of {self['num_trained_tokens'] + self['num_cut_tokens']:,}"
        )

    def _split(self) -> str:
        if not self["num_split_examples"]:
            return ""
        return (
            f"{count_of(self['num_split_examples'], self.example)} longer than max_row_tokens split over several "
            f"rows, which repeat {self['num_repeated_tokens']:,} of {self['num_row_tokens']:,} tokens"
        )

    def _sharing(self) -> str:
        # Packing says it of conversations; pairs are packed when a batch is made.
        if self.example == "conversation" or not self["num_row_tokens"]:
            return ""
        return f"sharing factor {self['num_sample_tokens'] / self['num_row_tokens']:.2f}"


@dataclass(frozen=True, slots=True)
class PackingReport:
    """How full packed rows are, and what conversations share in them."""

    num_rows: int
    num_row_tokens: int  # in all rows
    max_row_tokens: int  # capacity of a row
    num_unpacked_tokens: int  # in the conversations' own trees
    num_sample_tokens: int  # in all samples: what N-pass computes

    @classmethod
    def from_rows(cls, packed: Dataset, max_row_tokens: int, report: Report) -> PackingReport:
        """Return the report on packed rows of conversations, on which there is a report already."""
        num_tokens = int(pc.sum(packed.data.table["num_tokens"]).as_py())
        return cls(len(packed), num_tokens, max_row_tokens, report["num_row_tokens"], report["num_sample_tokens"])

    @property
    def fill_rate(self) -> float:
        """Tokens in the rows ÷ their capacity."""
        return self.num_row_tokens / (self.num_rows * self.max_row_tokens)

    @property
    def sharing_within(self) -> float:
        """Tokens in all samples ÷ tokens in the conversations' own trees."""
        return self.num_sample_tokens / self.num_unpacked_tokens

    @property
    def sharing_across(self) -> float:
        """Tokens in the conversations' own trees ÷ tokens in the rows."""
        return self.num_unpacked_tokens / self.num_row_tokens

    def __str__(self) -> str:
        return (
            f"packed into {count_of(self.num_rows, 'row')} of at most {self.max_row_tokens} tokens, "
            f"{self.fill_rate:.1%} full; "
            f"sharing factor {self.sharing_within:.2f} within conversations × {self.sharing_across:.2f} across them = "
            f"{self.sharing_within * self.sharing_across:.2f}"
        )
