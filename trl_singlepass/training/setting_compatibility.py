"""Settings of TRL and transformers that the turns of a conversation cannot follow: each refused by name."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset

from ..data.dataset_format import column_names, holds_rows


def check_turn_settings(args: Any, dataset: Dataset | IterableDataset, packing: bool | None = None) -> None:
    """
    Refuse settings that conversations cannot follow; plain text follows them as in TRL.

    Args:
        args (`trl.SFTConfig`):
            Arguments of the run.
        dataset (`datasets.Dataset`, `datasets.IterableDataset`):
            Conversations.
        packing (`bool`, *optional*):
            Whether they are packed; what `args` say of training by default.

    Raises:
        `ValueError`: If a setting would change what is trained in a way that a single pass cannot honour.
    """
    is_prepared = holds_rows(column_names(dataset))
    packing = args.packing if packing is None else packing
    for refused, setting, why, way_out in (
        *_of_the_loss(args),
        (
            args.max_length is not None and args.truncation_mode != "keep_start",
            f"truncation_mode={args.truncation_mode!r}",
            "would give each turn another start, and turns of one conversation could no longer share it",
            "Use truncation_mode='keep_start', or max_length=None",
        ),
        (
            packing and args.packing_strategy != "bfd",
            f"packing_strategy={args.packing_strategy!r}",
            "cuts sequences anywhere, which would tear a tree apart",
            "Use packing_strategy='bfd', which packs whole conversations",
        ),
        (
            (args.dataset_kwargs or {}).get("skip_prepare_dataset") and not is_prepared,
            "dataset_kwargs={'skip_prepare_dataset': True}",
            "hands messages on as they are, and they have to become rows of tokens first",
            "Leave it out",
        ),
        (
            isinstance(dataset, Dataset) and args.accelerator_config.dispatch_batches,
            "accelerator_config={'dispatch_batches': True}",
            "cuts the batches of the first process into parts for the others, which would tear a tree apart",
            "Leave it out: each process then reads rows of its own",
        ),
        (
            "inputs" in args.include_for_metrics,
            "include_for_metrics=['inputs']",
            "asks for one row of tokens per example, and a batch of conversations is one row",
            "Leave 'inputs' out: the labels that compute_metrics gets are the tokens that are trained",
        ),
    ):
        if refused:
            raise ValueError(f"{setting} does not work for conversations in a single pass: it {why}. {way_out}.")


def _of_the_loss(args: Any) -> tuple[tuple[bool, str, str, str], ...]:
    # TRL's own default is False, and means that nobody has asked.
    has_own_default = args.__dataclass_fields__["assistant_only_loss"].default is None
    why = "would train what users and tools wrote as well, and what is trained is what the model says, turn by turn"
    way_out = "Leave it out, or use TRL's SFTTrainer to train every token of a conversation"
    return (
        (args.completion_only_loss is False, "completion_only_loss=False", why, way_out),
        (has_own_default and args.assistant_only_loss is False, "assistant_only_loss=False", why, way_out),
    )
