"""Reports: what a dataset held, what is not trained, and how full its rows are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from ..trees.sample import CompletionKind
from .bad_rows import RowErrors, describe_dropped, group_errors
from .conversations import IMAGE_COUNT_COLUMNS, KIND_COLUMNS


_NUM_NAMED = 3  # overlong turns that a report names


@dataclass(frozen=True, slots=True)
class PreparationReport:
    """What a dataset held, and what is not trained."""

    num_conversations: int  # without bad rows
    num_turns: int
    num_turns_without_prompt: int  # further assistant messages that open a conversation and are context only
    kinds: Mapping[CompletionKind, int]  # all turns, by how their completions came about
    num_unselected_turns: int  # context only, by their weight or by `train_turns`
    num_empty_blocks: int  # trained turns without reasoning for which the template writes an empty block
    num_trained_tokens: int  # as N-pass trains them; together with `num_cut_tokens`, all completion tokens
    num_cut_turns: int  # too long and trained in part
    num_dropped_turns: int  # too long and not trained at all
    num_cut_tokens: int  # completion tokens that are not trained
    num_dropped_conversations: int  # conversations of which no turn is trained
    num_split_conversations: int  # split over several rows
    num_sample_tokens: int  # in all trained samples: what N-pass computes
    num_row_tokens: int  # in all rows, before packing
    num_repeated_tokens: int  # tokens of history among them that splitting repeats
    num_sample_images: int  # in all trained samples: what N-pass encodes
    num_row_images: int  # distinct images of each row, over all rows: what a single pass encodes
    overlong: tuple[str, ...]  # the first few turns that are too long, by name
    bound: str | None = None  # the setting that they exceed
    bad_rows: tuple[RowErrors, ...] = ()  # dropped because they cannot be trained, by reason

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, Sequence[int]],
        lengths: Sequence[int],
        bound: str | None,
        bad_rows: Sequence[tuple[int, str]] = (),
    ) -> PreparationReport:
        """
        Return the report on prepared rows.

        `counts` are `COUNT_COLUMNS`, and `IMAGE_COUNT_COLUMNS` of a dataset with images, one value per row; `lengths`
        are the tokens in each row. `bound` is the setting that bounds a sample ([`RowSettings.bound`]), `bad_rows` the
        index and reason of each row that was dropped.
        """
        num_rows: dict[int, int] = {}
        for conversation, length in zip(counts["conversation"], lengths, strict=True):
            num_rows[conversation] = num_rows.get(conversation, 0) + (length > 0)
        kinds = {kind: sum(counts[column]) for kind, column in KIND_COLUMNS.items()}
        turns = ("num_turns", "num_turns_without_prompt", "num_unselected_turns", "num_cut_turns", "num_dropped_turns")
        tokens = ("num_trained_tokens", "num_cut_tokens", "num_sample_tokens", "num_repeated_tokens")
        return cls(
            num_conversations=len(num_rows) - len(bad_rows),
            num_dropped_conversations=sum(number == 0 for number in num_rows.values()) - len(bad_rows),
            num_split_conversations=sum(number > 1 for number in num_rows.values()),
            num_row_tokens=sum(lengths),
            overlong=_name_overlong_turns(counts),
            bound=bound,
            kinds={kind: count for kind, count in kinds.items() if count},
            bad_rows=group_errors(bad_rows),
            num_empty_blocks=sum(counts["num_empty_blocks"]),
            **{name: sum(counts.get(name, ())) for name in (*turns, *tokens, *IMAGE_COUNT_COLUMNS)},
        )

    def __add__(self, other: PreparationReport) -> PreparationReport:
        """Return the report on both parts of a dataset, which have no conversation in common."""
        return replace(
            self,
            kinds=dict(Counter(self.kinds) + Counter(other.kinds)),
            overlong=(self.overlong + other.overlong)[:_NUM_NAMED],
            bad_rows=self.bad_rows + other.bad_rows,
            **{name: getattr(self, name) + getattr(other, name) for name in _numbers()},
        )

    @property
    def num_bad_rows(self) -> int:
        """Rows that cannot be trained and were dropped."""
        return sum(errors.count for errors in self.bad_rows)

    @property
    def is_complete(self) -> bool:
        """Whether every token of every turn of every row is trained."""
        return self.num_cut_tokens == 0 and not self.bad_rows and not self.num_turns_without_prompt

    def __str__(self) -> str:
        held = f"{describe_dropped(self.bad_rows)}; " if self.bad_rows else ""
        held += f"{self.num_turns} turns of {self.num_conversations} conversations{self._rendered}; {self._images}"
        if self.num_turns_without_prompt:
            held += f"{self.num_turns_without_prompt} assistant messages before any prompt, which are context only; "
        if self.num_unselected_turns:
            held += f"{self.num_unselected_turns} of them context only, by weight or train_turns; "
        if self.num_empty_blocks:
            held += f"{self.num_empty_blocks} turns without reasoning, which train an empty block of it; "
        if self.num_cut_tokens == 0:
            return f"{held}all {self.num_trained_tokens} completion tokens trained{self._split}"
        return (
            f"{held}not trained: {self.num_cut_tokens} completion tokens past {self.bound}, in "
            f"{self.num_cut_turns} turns that are trained in part and {self.num_dropped_turns} turns dropped whole "
            f"({self.num_dropped_conversations} conversations dropped whole; {', '.join(self.overlong)}{self._more}), "
            f"of {self.num_trained_tokens + self.num_cut_tokens}{self._split}"
        )

    @property
    def _rendered(self) -> str:
        """How the turns were rendered, where there is something to say about it."""
        if set(self.kinds) <= {CompletionKind.AS_SERVED, CompletionKind.GIVEN_AS_TOKENS}:
            return ""
        return f" ({', '.join(f'{count} {kind}' for kind, count in self.kinds.items())})"

    @property
    def _images(self) -> str:
        if not self.num_sample_images:
            return ""
        return (
            f"{self.num_row_images} image encodings instead of {self.num_sample_images} "
            f"({self.num_sample_images / self.num_row_images:.1f} times fewer); "
        )

    @property
    def _split(self) -> str:
        if not self.num_split_conversations:
            return ""
        return (
            f"; {self.num_split_conversations} conversations longer than max_row_tokens split over several rows, "
            f"which repeat {self.num_repeated_tokens} of {self.num_row_tokens} tokens"
        )

    @property
    def _more(self) -> str:
        others = self.num_cut_turns + self.num_dropped_turns - len(self.overlong)
        return f" and {others} more" if others else ""


def _numbers() -> list[str]:
    return [field.name for field in fields(PreparationReport) if field.name.startswith("num_")]


def _name_overlong_turns(counts: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    columns = (counts[name] for name in ("conversation", "overlong_message", "overlong_length"))
    named = [
        f"row {conversation}{f', message {message}' if message >= 0 else ''}: {length} tokens"
        for conversation, message, length in zip(*columns, strict=True)
        if length
    ]
    return tuple(named[:_NUM_NAMED])


@dataclass(frozen=True, slots=True)
class PackingReport:
    """How full packed rows are, and what conversations share in them."""

    num_rows: int
    num_row_tokens: int  # in all rows
    max_row_tokens: int  # capacity of a row
    num_unpacked_tokens: int  # in the conversations' own trees
    num_sample_tokens: int  # in all samples: what N-pass computes

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
            f"packed into {self.num_rows} rows of at most {self.max_row_tokens} tokens, {self.fill_rate:.1%} full; "
            f"sharing factor {self.sharing_within:.2f} within conversations × {self.sharing_across:.2f} across them = "
            f"{self.sharing_within * self.sharing_across:.2f}"
        )
