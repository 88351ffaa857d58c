"""What preference pairs cannot honour in a single pass: each check names the setting, the reason and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trl
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from packaging.version import Version
from transformers import DataCollator, PreTrainedModel
from trl import DPOConfig

from ..data.collator import check_collator
from ..data.dataset_format import check_is_dataset, column_names
from ..data.images import holds_images
from ..engine.enable import check_model, check_not_compiled
from ..images.reading import check_reads_images
from ..training.adapters import check_adapters
from ..training.compatibility import check_before_loading, check_engine, check_parallelism
from ..trees.rows import IMAGE_COLUMNS
from .collator import DataCollatorForSinglePassPreference
from .pairs import SIDES, TOKEN_COLUMNS
from .rows import PAIR_COLUMNS


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# Losses that read the log-probability of each token, or divide by their number.
_PER_TOKEN_LOSSES = frozenset({"ipo", "sigmoid_norm", "sft"})


def check_pairs(
    args: DPOConfig,
    dataset: Dataset | IterableDataset | None,
    data_collator: DataCollator | None,
    model: str | PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    ref_model: PreTrainedModel | None,
) -> None:
    """
    Check what the user passed to the trainer, before anything expensive starts.

    What a single pass cannot honour raises `ValueError`, a dataset that is not one `TypeError`, and a model that it
    would train incorrectly `UnsupportedModelError`.
    """
    if Version(trl.__version__) < Version("1.16"):
        raise ValueError(f"SinglePassDPOTrainer needs trl>=1.16, found {trl.__version__}. Upgrade trl.")
    check_before_loading(args)
    check_settings(args)
    if dataset is not None:
        check_dataset(dataset, "train")
    if data_collator is not None:
        check_collator(data_collator, DataCollatorForSinglePassPreference)
    for each in (model, ref_model):
        check_not_compiled(each)
    check_adapters(model, peft_config)
    check_parallelism(args.parallelism_config)
    if isinstance(model, PreTrainedModel):
        check_model(model)
        if dataset is not None and (holds_images(dataset) or set(IMAGE_COLUMNS) <= set(column_names(dataset))):
            check_reads_images(model)


def check_dataset(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse a dataset that holds no pairs."""
    columns = set(column_names(check_is_dataset(dataset, name)))
    if not any(set(expected) <= columns for expected in (SIDES, TOKEN_COLUMNS, PAIR_COLUMNS)):
        raise ValueError(
            f"The {name} dataset holds no pairs: expected the columns 'prompt', 'chosen' and 'rejected', or 'chosen' "
            f"and 'rejected' that begin alike, got {sorted(columns)}. Rename its columns. SinglePassSFTTrainer and "
            "`trl-singlepass train` take conversations."
        )


def check_settings(args: DPOConfig) -> None:
    """Refuse settings that pairs cannot follow."""
    has_weights = args.turn_discount is not None or args.turn_mean
    weighs = "turn_discount" if args.turn_discount is not None else "turn_mean"
    for refused, setting, why, way_out in (
        (
            args.max_length is not None and args.truncation_mode != "keep_start",
            f"truncation_mode={args.truncation_mode!r}",
            "would start each turn at a different token, and turns could no longer share a prefix",
            "Use truncation_mode='keep_start', or max_length=None",
        ),
        (
            args.accelerator_config.dispatch_batches,
            "accelerator_config={'dispatch_batches': True}",
            "splits the batches of the first process among the others, which would break up trees",
            "Leave it out: each process then reads its own pairs",
        ),
        (
            "inputs" in args.include_for_metrics,
            "include_for_metrics=['inputs']",
            "asks for one row of tokens per example, but a batch of pairs is a single row",
            "Leave 'inputs' out: the labels that compute_metrics receives are the tokens that count",
        ),
        (
            has_weights and bool(_PER_TOKEN_LOSSES & set(args.loss_type)),
            f"loss_type={args.loss_type!r} with {weighs}",
            "divides by the number of tokens itself, so that turns would be weighed twice",
            f"Leave out {weighs}, or choose a loss that reads sums of log-probabilities, such as 'sigmoid'",
        ),
        (
            has_weights and args.use_weighting,
            f"use_weighting=True with {weighs}",
            "reads the log-probability of each token, which would already be weighed",
            f"Leave out one of them, use_weighting or {weighs}",
        ),
        (
            has_weights and args.ld_alpha is not None,
            f"ld_alpha={args.ld_alpha} with {weighs}",
            "weighs the tokens past the length of the shorter trajectory a second time",
            f"Leave out one of them, ld_alpha or {weighs}",
        ),
    ):
        if refused:
            raise ValueError(f"{setting} does not work for pairs in a single pass: it {why}. {way_out}.")


def check_run(accelerator: Accelerator, args: DPOConfig, *, tp_size: int) -> None:
    """
    Check the engine and the parallelism that accelerate and transformers set up: pairs must have been shown to train
    exactly under it.
    """
    config = accelerator.parallelism_config  # may come from accelerate's own configuration
    check_parallelism(config)
    check_engine(args, accelerator)
    for name, size in (("tp_size", tp_size), ("sp_size", getattr(config, "sp_size", None) or 1)):
        if size > 1:
            raise ValueError(
                f"{name}={size} does not work for pairs: ranks that share a row do not share its pairs. Set it to 1, "
                "and shard the model with FSDP2 or ZeRO-3."
            )
