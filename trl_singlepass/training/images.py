"""Training on rows with images: what the model and the collator need for them, and what does not go with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

from ..data.collator import DataCollatorForSinglePass
from ..data.dataset_format import column_names
from ..engine.enable import enable_images
from ..trees.rows import IMAGE_COLUMNS
from .refusals import IMAGES, check
from .situation import Situation


Rows: TypeAlias = Dataset | IterableDataset | Mapping[str, Any] | None


def show_images(*datasets: Rows) -> bool:
    """Return whether any of some prepared datasets has rows with images."""
    return any(
        show_images(*rows.values()) if isinstance(rows, Mapping) else set(IMAGE_COLUMNS) <= set(column_names(rows))
        for rows in datasets
        if rows is not None
    )


def read_images(run: Situation, collator: DataCollatorForSinglePass, *datasets: Rows) -> bool:
    """
    Make a model and a collator read images if any of some prepared datasets has rows with images; return whether.

    Images that a tree cannot give to the model raise `UnsupportedImagesError`, settings and engines that do not go
    with images `ValueError`.
    """
    if not show_images(*datasets):
        return False
    check(run, IMAGES)
    enable_images(run.model, collator)
    if run.accelerator is not None and run.accelerator.num_processes > 1:
        # Ranks reduce the gradients of the encoder together, and some shard it: all have to run it, or none.
        collator.blank_image = getattr(collator.load_images, "blank", None)
        if collator.blank_image is None:
            raise ValueError(
                "On several ranks, a row without images shows the model a blank one, so that all ranks run its "
                "encoder. Give the load_images of your data_collator a method `blank`, or leave data_collator unset."
            )
    return True
