"""Settings that a single pass cannot honour: each refused by name, with the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trl
from packaging.version import Version
from transformers import DataCollator

from .collator import DataCollatorForSinglePass


def check_dataset(example: Mapping[str, Any]) -> None:
    """
    Refuse conversations with images.

    Args:
        example (`Mapping[str, Any]`):
            First row of a dataset.

    Raises:
        `ValueError`: If the row holds images.
    """
    images = sorted({"image", "images"} & set(example))
    if images:
        raise ValueError(
            f"The dataset has a column {images[0]!r}: images are not supported in a single pass, since their "
            "positions have several dimensions. Remove the column to train on text, or use "
            "TRL's SFTTrainer."
        )


def check_collator(data_collator: DataCollator | None) -> None:
    """
    Refuse a collator that would lose the tree.

    Args:
        data_collator (`DataCollator`, *optional*):
            Collator that the user passed.

    Raises:
        `ValueError`: If it is not a `DataCollatorForSinglePass`.
    """
    if data_collator is not None and not isinstance(data_collator, DataCollatorForSinglePass):
        raise ValueError(
            f"data_collator={type(data_collator).__name__} would drop the tree of the rows, and branches would be "
            "trained as one text. Leave data_collator unset, or pass a subclass of DataCollatorForSinglePass."
        )


def check_peft(model: Any, peft_config: Any) -> None:
    """
    Refuse prompt-learning adapters.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`, `str`):
            Model that the user passed.
        peft_config (`peft.PeftConfig`, *optional*):
            Adapter configuration that the user passed.

    Raises:
        `ValueError`: If an adapter adds virtual tokens.
    """
    configs = [peft_config, *getattr(model, "peft_config", {}).values()]
    for config in configs:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(config).__name__} adds virtual tokens in front of the row, which belongs to no branch of the "
                "tree. Use an adapter that adds no tokens, such as LoraConfig."
            )


def check_parallelism(parallelism_config: Any) -> None:
    """
    Refuse to split a row over devices in ways that lose the tree.

    Args:
        parallelism_config (`accelerate.ParallelismConfig`, *optional*):
            Parallelism of the run.

    Raises:
        `ValueError`: If context or sequence parallelism is on.
    """
    if parallelism_config is None:
        return
    if parallelism_config.cp_size > 1:
        raise ValueError(
            f"cp_size={parallelism_config.cp_size}: context parallelism replaces every attention mask by a causal "
            "one, so branches would see each other. Set cp_size=1 and bound the row length with max_length instead."
        )
    if getattr(parallelism_config, "sp_size", 1) > 1:
        raise ValueError(
            f"sp_size={parallelism_config.sp_size}: sequence parallelism splits a row without its tree, so branches "
            "would see each other. Set sp_size=1 and bound the row length with max_length instead."
        )


def check_weights_reach_the_loss(trainer: Any) -> None:
    """
    Refuse losses that would not read loss weights.

    Args:
        trainer (`trl.SFTTrainer`):
            Trainer whose batch has weights other than 1.

    Raises:
        `ValueError`: If it computes such a loss, or TRL is too old to return losses per token.
    """
    if Version(trl.__version__) < Version("1.15"):
        raise ValueError(f"Loss weights other than 1 need trl>=1.16, found {trl.__version__}. Upgrade trl.")
    for name, is_set in (
        ("loss_type='dft'", trainer.args.loss_type == "dft"),
        ("label_smoothing_factor", trainer.label_smoother is not None),
        ("compute_loss_func", trainer.compute_loss_func is not None),
    ):
        if is_set:
            raise ValueError(
                f"{name} computes its own loss, which does not read loss weights, and this batch has weights other "
                f"than 1. Unset {name}, or give every message the same weight."
            )
