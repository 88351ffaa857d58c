"""When a run is checked: before anything expensive starts, with the engine that it got, and with its first rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from transformers import DataCollator, PreTrainedModel
from trl import DPOConfig, SFTConfig

from ..data.collator import DataCollatorForSinglePass, check_collator
from ..data.dataset_format import check_is_dataset, column_names, holds_rows
from ..data.images import holds_images
from ..data.pairs import PAIR_COLUMNS, SIDES, TOKEN_COLUMNS
from ..engine.enable import check_model, check_not_compiled, enable_images
from ..images.reading import check_reads_images
from ..trees.rows import IMAGE_COLUMNS
from .checkpoints import check_state
from .refusals import ADAPTERS, ENGINES, IMAGES, PACKAGES, TURNS, Scope, check, check_parts
from .situation import Situation


_TEMPLATE_FILES = (".jinja", ".j2")  # TRL takes any other file for a model


def check_before_loading(args: SFTConfig | DPOConfig) -> None:
    """Refuse bad or missing files (`ValueError`) and missing packages (`ImportError`) before a model is loaded."""
    if isinstance(args.resume_from_checkpoint, str):
        check_state(args.resume_from_checkpoint)
    folder = Path(args.output_dir)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise ValueError(f"output_dir={args.output_dir!r} cannot be made: {nearest} is a file. Choose another folder.")
    _check_chat_template_path(getattr(args, "chat_template_path", None))
    check(Situation(args), PACKAGES)


def _check_chat_template_path(given: str | None) -> None:
    if given is None or Path(given).is_dir():
        return
    name = f"chat_template_path={given!r}"
    if Path(given).is_file():
        if not given.endswith(_TEMPLATE_FILES):
            raise ValueError(f"{name}: a file with a template must end in {' or '.join(_TEMPLATE_FILES)}. Rename it.")
        return
    is_path = given.endswith(_TEMPLATE_FILES) or given.count("/") > 1 or given.startswith((".", "/", "~"))
    if is_path or (is_offline_mode() and not isinstance(try_to_load_from_cache(given, "tokenizer_config.json"), str)):
        raise ValueError(
            f"{name}: there is no such file. Expected a file that ends in {' or '.join(_TEMPLATE_FILES)}, or a model "
            "with a chat template: a folder, or an id on the Hub, which must be in the cache without a network."
        )


def check_arguments(
    run: Situation, data_collator: DataCollator | None, expected_collator: type, *scopes: Scope
) -> None:
    """Check what the user passed to a trainer, before anything expensive starts, in some scopes of refusals."""
    check_before_loading(run.args)
    check(run, TURNS, *scopes)
    check_parts(Situation(run.args, compute_loss_func=run.compute_loss_func))  # layers may change until they run
    if data_collator is not None:
        check_collator(data_collator, expected_collator)
    check_not_compiled(run.model)
    check(run, ADAPTERS, ENGINES)
    if isinstance(run.model, PreTrainedModel):
        check_model(run.model)
        if run.dataset is not None and (holds_images(run.dataset) or show_images(run.dataset)):
            check_reads_images(run.model)


def check_pairs(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse a dataset that holds no pairs."""
    columns = set(column_names(check_is_dataset(dataset, name)))
    holds_pairs = holds_rows(columns) and set(PAIR_COLUMNS) <= columns
    if not (holds_pairs or any(set(expected) <= columns for expected in (SIDES, TOKEN_COLUMNS))):
        raise ValueError(
            f"The {name} dataset holds no pairs: expected the columns 'prompt', 'chosen' and 'rejected', or 'chosen' "
            f"and 'rejected' that begin alike, got {sorted(columns)}. Rename its columns. SinglePassSFTTrainer and "
            "`trl-singlepass train` take conversations."
        )


def show_images(*datasets: Dataset | IterableDataset | Mapping[str, Any] | None) -> bool:
    """Return whether any of some prepared datasets, or dictionaries of them, has rows with images."""
    return any(
        show_images(*rows.values()) if isinstance(rows, Mapping) else set(IMAGE_COLUMNS) <= set(column_names(rows))
        for rows in datasets
        if rows is not None
    )


def read_images(run: Situation, collator: DataCollatorForSinglePass, *models: PreTrainedModel) -> None:
    """Make models and a collator read rows with images; what does not go with them is a `ValueError`."""
    check(run, IMAGES)
    for model in models:
        enable_images(model, collator)
    if run.accelerator is not None and run.accelerator.num_processes > 1:
        # Ranks reduce the gradients of the encoder together, and some shard it: all have to run it, or none.
        collator.blank_image = getattr(collator.load_images, "blank", None)
        if collator.blank_image is None:
            raise ValueError(
                "On several ranks, a row without images shows the model a blank one, so that all ranks run its "
                "encoder. Give the load_images of your data_collator a method `blank`, or leave data_collator unset."
            )
