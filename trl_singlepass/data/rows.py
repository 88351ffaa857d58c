"""From samples to rows of a dataset: the one list of a conversation, the labelled lists of a pair or a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ..trees.image_features import FeatureNumbers, shown_images
from ..trees.prefix_tree import PrefixTree, sample_paths
from ..trees.rows import ROW_COLUMNS, Row
from ..trees.sample import CompletionKind, Sample
from ..trees.splitting import split_samples
from .selection import FittedSamples


Targets = Mapping[str, Sequence[NDArray[np.int64]]]
"""By the label of each list of samples in a row: for each sample, the positions that predict its trained tokens."""
KIND_COUNTS = {kind: f"num_{kind.name.lower()}_turns" for kind in CompletionKind}
COUNTS = (
    "num_examples",  # without bad rows
    "num_dropped_examples",  # nothing of them is trained
    "num_split_examples",  # over several trees, since one would be larger than a row
    "num_turns",
    *KIND_COUNTS.values(),  # all turns, by how their completions came about
    "num_turns_without_prompt",  # further assistant messages that open a conversation and are context only
    "num_unselected_turns",  # context only, by their weight or by `train_turns`
    "num_empty_blocks",  # trained turns without reasoning for which the template writes an empty block
    "num_shared_turns",  # in an equal context in both trajectories of a pair
    "num_equal_examples",  # pairs of which both trajectories are equal
    "num_trained_tokens",  # as N-pass trains them; together with `num_cut_tokens`, all completion tokens
    "num_cut_turns",  # too long and trained in part
    "num_dropped_turns",  # too long and not trained at all
    "num_cut_tokens",  # completion tokens that are not trained
    "num_sample_tokens",  # in all trained samples: what N-pass computes
    "num_row_tokens",  # in all rows, before packing
    "num_repeated_tokens",  # tokens of history among them that splitting repeats
    "num_sample_images",  # in all trained samples: what N-pass encodes
    "num_row_images",  # distinct images of each row, over all rows: what a single pass encodes
)
"""What is counted of the examples that rows are made of; a report holds the sums."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRow:
    """A row on its way into a dataset, and what a report counts of it."""

    row: Row
    counts: Mapping[str, int] = field(default_factory=dict)  # of `COUNTS`
    overlong: str | None = None  # names the first turn that is too long, if there is one
    targets: Targets = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)


def empty_row() -> Row:
    """Return the row of an example of which nothing is trained."""
    return Row.from_columns(dict.fromkeys(ROW_COLUMNS, ()))


def separate_rows(fitted: FittedSamples, index: int, max_row_tokens: int | None) -> list[PreparedRow]:
    """Return samples as a row, or as several where their tree is larger than one; the counts are beside the first."""
    trees = [PrefixTree.from_samples(part) for part in _split(fitted.samples, max_row_tokens)]
    rows = list(map(Row.from_tree, trees)) or [empty_row()]
    counts = _count([fitted], trees, num_images=sum(len(row.images) for row in rows))
    return [PreparedRow(rows[0], counts, _name_overlong([fitted], index)), *map(PreparedRow, rows[1:])]


def joined_row(
    lists: Mapping[str, FittedSamples], index: int, max_row_tokens: int | None, **further_counts: int
) -> PreparedRow:
    """
    Return labelled lists of samples as one row, which is empty if nothing is left of one of them. The lists number
    their images together ([`with_images_numbered_together`]).

    Where their tree is larger than `max_row_tokens`, the row holds several side by side, of which each fits. A target
    is named by the position that predicts it. Prompt `[1, 2]`, chosen `[3]`, rejected `[4, 5]`:

        position             0     1     2     3     4     5
        input_ids            1     2     4     5     2     3
        labels            -100  -100     4     5  -100     3

    The only target of the chosen list is predicted at position 4, those of the rejected one at 1 and 2.
    """
    fitted = list(lists.values())
    samples = [sample for each in fitted for sample in each.samples]
    parts = _split(samples, max_row_tokens) if all(each.samples for each in fitted) else []
    trees = list(map(PrefixTree.from_samples, parts))
    rows = list(map(Row.from_tree, trees)) or [empty_row()]
    row = rows[0] if len(rows) == 1 else Row.join(rows)
    counts = _count(fitted, trees, num_images=len(row.images))
    counts.update(further_counts)
    targets = dict(zip(lists, _targets(fitted, trees, parts), strict=True)) if parts else {}
    return PreparedRow(row, counts, _name_overlong(fitted, index), targets)


def with_images_numbered_together(lists: Sequence[FittedSamples]) -> list[FittedSamples]:
    """Return lists whose samples number the images of all, as the samples of one tree must."""
    samples = [sample for fitted in lists for sample in fitted.samples]
    if all(sample.image_features is None for sample in samples):
        return list(lists)
    numbers = FeatureNumbers()
    numbers.add(sorted((image for sample in samples for image in sample.images), key=lambda image: image.in_company))

    def renumbered(sample: Sample) -> Sample:
        assert sample.image_features is not None, "one reader reads all lists"
        features = numbers.renumber(sample.image_features, sample.images)
        return replace(sample, image_features=features, images=numbers.images)

    return [replace(fitted, samples=tuple(map(renumbered, fitted.samples))) for fitted in lists]


def _targets(
    lists: Sequence[FittedSamples], trees: Sequence[PrefixTree], parts: Sequence[Sequence[Sample]]
) -> Iterator[list[NDArray[np.int64]]]:
    """Yield where the targets of each list are in a row of trees side by side, of which each holds a part of them."""
    starts = np.cumsum([0, *map(len, trees[:-1])])
    places = zip(starts, map(target_positions, trees, parts), strict=True)
    positions = iter([start + of_sample for start, of_tree in places for of_sample in of_tree])
    for fitted in lists:
        yield list(islice(positions, len(fitted.samples)))


def _split(samples: Sequence[Sample], max_row_tokens: int | None) -> list[list[Sample]]:
    return [part for part in split_samples(samples, max_row_tokens) if part]


def target_positions(tree: PrefixTree, samples: Sequence[Sample]) -> list[NDArray[np.int64]]:
    """Return, for each sample of a tree, the positions that predict its trained tokens."""
    positions, labels = [], tree.labels
    for sample, path in zip(samples, sample_paths(tree, samples), strict=True):
        trained = np.flatnonzero(sample.loss_weights)
        predicting = path[trained - 1]
        assert np.array_equal(labels[predicting + 1], sample.token_ids[trained]), "every target has its place"
        positions.append(predicting)
    return positions


def _count(lists: Sequence[FittedSamples], trees: Sequence[PrefixTree], num_images: int) -> Counter[str]:
    """
    Return what is counted of an example (see `COUNTS`), given the trees that its lists of samples became and how many
    images the rows hold. Without trees, nothing of it is trained, whatever is left of some of the lists.
    """
    samples = [sample for fitted in lists for sample in fitted.samples]
    counts = Counter(num_examples=1, num_empty_blocks=sum(sample.has_empty_block for sample in samples))
    for fitted in lists:
        counts.update(fitted.counts)
    if not trees:
        counts.update(num_dropped_examples=1, num_trained_tokens=-counts["num_trained_tokens"])
        return counts
    counts["num_sample_tokens"] = sum(map(len, samples))
    counts["num_row_tokens"] = sum(map(len, trees))
    counts["num_sample_images"] = sum(len(shown_images(sample.image_features, sample.images)) for sample in samples)
    counts["num_row_images"] = num_images
    if len(trees) > 1:
        counts["num_split_examples"] = 1
        counts["num_repeated_tokens"] = counts["num_row_tokens"] - len(PrefixTree.from_samples(samples))
    return counts


def _name_overlong(lists: Sequence[FittedSamples], index: int) -> str | None:
    """Return how a report names the first turn of an example that is too long, if there is one."""
    overlong = next((sample for fitted in lists for sample in fitted.overlong), None)
    if overlong is None:
        return None
    where = "" if overlong.message_index is None else f", message {overlong.message_index}"
    return f"row {index}{where}: {len(overlong)} tokens"
