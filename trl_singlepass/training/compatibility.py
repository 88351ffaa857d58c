"""What a single pass cannot honour: each check names the setting, the reason and the way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import accelerate
import transformers
import trl
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from packaging.version import Version
from transformers import DataCollator, PreTrainedModel, TrainingArguments
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
    is_liger_kernel_available,
)
from trl import DPOConfig, SFTConfig

from ..data.collator import check_collator
from ..data.dataset_format import column_names, holds_rows
from ..data.images import holds_images
from ..engine.enable import check_model, check_not_compiled, without_adapters
from ..images.reading import check_reads_images
from ..recurrent.introspection import path_dependent_layer_names
from ..trees.rows import IMAGE_COLUMNS
from .adapters import check_adapters
from .checkpoints import check_state


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_TRAINS_USERS = "would also train what users and tools wrote; a single pass trains what the model says, turn by turn"
_ENGINES_OFF = "Check the launch: `accelerate launch --cpu`, ACCELERATE_USE_CPU and use_cpu=True switch engines off"
_FSDP_ON_CPU = "FSDP needs a GPU. To try two processes on a CPU, use DDP: use_cpu=True, and no FSDP configuration"
_TRAIN_ALL = "Leave it out, or use TRL's SFTTrainer to train every token of a conversation"
_TEMPLATE_FILES = (".jinja", ".j2")  # TRL takes any other file for a model
_FLASH_PACKAGES: dict[str, tuple[str, Callable[[], bool]]] = {
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
}


def check_before_loading(args: SFTConfig | DPOConfig) -> None:
    """
    Refuse files that do not exist and packages that are not installed, of which TRL would tell only after loading the
    model, and the Trainer after the first step; and a checkpoint without a readable state. A file raises `ValueError`,
    a package `ImportError`.
    """
    if isinstance(args.resume_from_checkpoint, str):
        check_state(args.resume_from_checkpoint)
    _check_output_dir(args.output_dir)
    _check_chat_template_path(getattr(args, "chat_template_path", None))
    attention = (args.model_init_kwargs or {}).get("attn_implementation") or ""
    package, is_available = _FLASH_PACKAGES.get(attention, ("", lambda: True))
    if not (is_available() or is_kernels_available()):
        raise ImportError(
            f"attn_implementation={attention!r} needs the package {package}, or kernels, with which it comes from the "
            "Hub. Run pip install kernels, or set attn_implementation='sdpa'."
        )


def _check_output_dir(output_dir: str) -> None:
    folder = Path(output_dir)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise ValueError(f"output_dir={output_dir!r} cannot be made: {nearest} is a file. Choose another folder.")


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


def check_conversations(
    args: SFTConfig,
    dataset: Dataset | IterableDataset,
    data_collator: DataCollator | None,
    model: str | PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
) -> None:
    """
    Check what the user passed to the trainer along with a dataset of conversations, before anything expensive starts.

    What a single pass cannot honour raises `ValueError`, a missing package `ImportError`, a model that it would train
    incorrectly `UnsupportedModelError`, and images that a tree cannot give to the model `UnsupportedImagesError`.
    """
    check_before_loading(args)
    check_turn_settings(args, dataset)
    if data_collator is not None:
        check_collator(data_collator)
    check_not_compiled(model)
    check_adapters(model, peft_config)
    check_parallelism(args.parallelism_config)
    if args.use_liger_kernel and not is_liger_kernel_available():  # transformers looks once the data is prepared
        raise ImportError("use_liger_kernel=True needs liger-kernel. Run pip install liger-kernel, or leave it out.")
    if isinstance(model, PreTrainedModel):
        check_saving(model, args)
        check_model(model)
        if holds_images(dataset) or set(IMAGE_COLUMNS) <= set(column_names(dataset)):
            check_reads_images(model)


# The dataset and its settings ----------------------------------------------------------------------------------------


def check_turn_settings(args: SFTConfig, dataset: Dataset | IterableDataset, packing: bool | None = None) -> None:
    """
    Refuse settings that the turns of conversations cannot follow; plain text follows them as in TRL. `packing`
    defaults to `args.packing`.
    """
    packing = args.packing if packing is None else packing
    # TRL's own default of assistant_only_loss is False, and means that nobody asked for it.
    defaults_to_none = args.__dataclass_fields__["assistant_only_loss"].default is None
    for refused, setting, why, way_out in (
        (args.completion_only_loss is False, "completion_only_loss=False", _TRAINS_USERS, _TRAIN_ALL),
        (
            defaults_to_none and args.assistant_only_loss is False,
            "assistant_only_loss=False",
            _TRAINS_USERS,
            _TRAIN_ALL,
        ),
        (
            args.max_length is not None and args.truncation_mode != "keep_start",
            f"truncation_mode={args.truncation_mode!r}",
            "would start each turn at a different token, and turns of one conversation could no longer share a prefix",
            "Use truncation_mode='keep_start', or max_length=None",
        ),
        (
            packing and args.packing_strategy != "bfd",
            f"packing_strategy={args.packing_strategy!r}",
            "cuts sequences at arbitrary tokens, which would break up trees",
            "Use packing_strategy='bfd', which packs whole conversations",
        ),
        (
            (args.dataset_kwargs or {}).get("skip_prepare_dataset") and not holds_rows(column_names(dataset)),
            "dataset_kwargs={'skip_prepare_dataset': True}",
            "passes messages on unprepared, but they must become rows of tokens first",
            "Leave it out",
        ),
        (
            isinstance(dataset, Dataset) and args.accelerator_config.dispatch_batches,
            "accelerator_config={'dispatch_batches': True}",
            "splits the batches of the first process among the others, which would break up trees",
            "Leave it out: each process then reads its own rows",
        ),
        (
            "inputs" in args.include_for_metrics,
            "include_for_metrics=['inputs']",
            "asks for one row of tokens per example, but a batch of conversations is a single row",
            "Leave 'inputs' out: the labels that compute_metrics receives are the trained tokens",
        ),
    ):
        if refused:
            raise ValueError(f"{setting} does not work for conversations in a single pass: it {why}. {way_out}.")


# The model and its loss ----------------------------------------------------------------------------------------------


def check_loss_is_per_token(model: PreTrainedModel | PeftModel, accepts_loss_kwargs: bool) -> None:
    """
    Refuse a loss that the model itself divides by the tokens of each batch: a step would not be a mean over tokens.

    `accepts_loss_kwargs` is `Trainer.model_accepts_loss_kwargs`: whether the model takes the divisor as an argument.
    Since 1.15, TRL computes a loss of its own instead.
    """
    if accepts_loss_kwargs or Version(trl.__version__) >= Version("1.15"):
        return
    raise ValueError(
        f"{type(without_adapters(model)).__name__} divides its loss by the tokens of each batch, so that trl "
        f"{trl.__version__} trains a mean of batch means. Upgrade to trl>=1.15, which computes the loss of each token "
        "itself."
    )


def check_weights_reach_the_loss(args: SFTConfig, compute_loss_func: Callable[..., object] | None) -> None:
    """Refuse, for a batch with loss weights other than 1, losses that would not read them."""
    if Version(trl.__version__) < Version("1.15"):
        raise ValueError(f"Loss weights other than 1 need trl>=1.15, found {trl.__version__}. Upgrade trl.")
    for name, is_set in (
        ("loss_type='dft'", args.loss_type == "dft"),
        ("label_smoothing_factor", args.label_smoothing_factor != 0),
        ("compute_loss_func", compute_loss_func is not None),
    ):
        if is_set:
            raise ValueError(
                f"{name} computes its own loss, which does not read loss weights, and this batch has weights other "
                f"than 1. Unset {name}, or give every message the same weight."
            )


# Several processes ---------------------------------------------------------------------------------------------------


def check_run(
    model: PreTrainedModel | PeftModel, args: TrainingArguments, accelerator: Accelerator, *, tp_size: int
) -> None:
    """Check the engine and the parallelism that accelerate and transformers set up."""
    check_parallelism(accelerator.parallelism_config)  # may come from accelerate's own configuration
    check_engine(args, accelerator)
    check_tensor_parallelism(model, args, tp_size=tp_size)


def check_parallelism(config: ParallelismConfig | None) -> None:
    """Refuse to divide a row among devices in a way that loses the tree."""
    if config is None:
        return
    if config.cp_size > 1:
        raise ValueError(
            f"cp_size={config.cp_size}: context parallelism replaces every attention mask by a causal one, so "
            "branches would see each other. Set cp_size=1, and share rows with sp_size instead."
        )
    if config.tp_size > 1 and getattr(config, "sp_size", 1) > 1:
        raise ValueError(
            f"tp_size={config.tp_size} and sp_size={config.sp_size} both divide the heads of attention. Set one of "
            "them to 1."
        )


def check_engine(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuse an engine other than the one asked for, DeepSpeed's tensor parallelism, and disconnected processes."""
    kind = accelerator.distributed_type
    asks_for_fsdp = bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    fsdp_advice = _FSDP_ON_CPU if accelerator.device.type == "cpu" else _ENGINES_OFF
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    for asked, name, expected, advice in (
        (bool(args.deepspeed), "DeepSpeed", DistributedType.DEEPSPEED, _ENGINES_OFF),
        (asks_for_fsdp and num_launched > 1, "FSDP", DistributedType.FSDP, fsdp_advice),
    ):
        if asked and kind != expected:
            raise ValueError(
                f"The run asks for {name}, but accelerate chose {kind.value}, which trains something else. {advice}."
            )
    plugin = accelerator.state.deepspeed_plugin
    tensor_parallel = {} if plugin is None else plugin.deepspeed_config.get("tensor_parallel", {})
    if tensor_parallel.get("autotp_size", 0) > 1:
        raise ValueError(
            f"autotp_size={tensor_parallel['autotp_size']}: tensor parallelism has not been shown to train a tree "
            "exactly. Leave tensor_parallel out of the DeepSpeed configuration, and shard the model with ZeRO-3."
        )
    if kind == DistributedType.NO and num_launched > 1:
        raise ValueError(
            f"Each of {num_launched} processes would train alone. Set ddp_backend, or use_cpu=True if there is no GPU."
        )


def check_tensor_parallelism(model: PreTrainedModel | PeftModel, args: TrainingArguments, *, tp_size: int) -> None:
    """Refuse pipelines, and what ranks that share the layers of a model get wrong."""
    base = without_adapters(model)
    sizes = getattr(base.config, "distributed_config", None)
    num_stages = getattr(sizes, "pp_size", None) or 1
    if num_stages > 1:
        raise ValueError(
            f"pp_size={num_stages}: a pipeline passes hidden states on without the tree. Leave it out, and shard the "
            "model with FSDP or ZeRO-3."
        )
    if tp_size == 1:
        return
    recurrent = path_dependent_layer_names(base)
    for refused, what, way_out in (
        (sizes is None, f"transformers {transformers.__version__}", "Upgrade to 5.24"),
        (args.wave_tokens is not None, "wave_tokens", "Leave it out, and set activation_checkpointing"),
        (bool(recurrent), f"{', '.join(recurrent)}, whose states are not divided", "Shard with FSDP or ZeRO-3"),
    ):
        if refused:
            raise ValueError(f"Tensor parallelism (tp_size) does not work with {what}. {way_out}.")


def check_saving(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse to save the optimizer of a model that transformers sharded as it loaded it."""
    is_shared = getattr(model, "is_distributed_loading_by_transformers", False)
    if is_shared and args.save_strategy != "no" and not args.save_only_model:
        raise ValueError(
            f"save_strategy={args.save_strategy.value!r}: transformers {transformers.__version__} cannot save the "
            "optimizer of a model that is loaded with a DistributedConfig (tp_size), and no run resumes without it. "
            "Set save_only_model=True or save_strategy='no', or shard with FSDP2 or ZeRO-3, which resume."
        )


def check_sequence_parallelism(model: PreTrainedModel | PeftModel, args: SFTConfig, accelerator: Accelerator) -> None:
    """Refuse what rows that ranks share (`sp_size` above 1) cannot honour."""
    config = without_adapters(model).config.get_text_config()
    engine = f"{accelerator.distributed_type.value}: accelerate {accelerate.__version__} shares rows on DeepSpeed only"
    unnamed = [name for name in ("num_attention_heads", "num_key_value_heads") if not hasattr(config, name)]
    for refused, what, way_out in (
        (accelerator.distributed_type != DistributedType.DEEPSPEED, engine, "Use DeepSpeed"),
        (
            Version(trl.__version__) < Version("1.16"),
            f"trl {trl.__version__}, whose fused head takes no shifted labels",
            "Upgrade to trl>=1.16",
        ),
        (args.fp16, "fp16, whose loss scale hides wrong gradients", "Use bf16"),
        (
            bool(unnamed),
            f"a model without {' and '.join(unnamed)} in its configuration, which DeepSpeed divides among ranks",
            "Train without sp_size",
        ),
    ):
        if refused:
            raise ValueError(f"Sequence parallelism (sp_size) does not work with {what}. {way_out}.")
