"""Settings that a single pass cannot honour: each refused by name, with the way out."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import transformers
import trl
from accelerate.utils import DistributedType
from packaging.version import Version
from transformers import DataCollator

from ..data.collator import DataCollatorForSinglePass
from ..recurrent.layer_kinds import path_dependent_layer_names
from .model import without_adapters


def check_dataset(columns: Collection[str]) -> None:
    """
    Refuse conversations with images.

    Args:
        columns (`Collection[str]`):
            Columns of a dataset.

    Raises:
        `ValueError`: If one of them holds images.
    """
    images = sorted({"image", "images"} & set(columns))
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
    Refuse to split a row over devices in a way that loses the tree.

    Args:
        parallelism_config (`accelerate.ParallelismConfig`, *optional*):
            Parallelism of the run.

    Raises:
        `ValueError`: If context parallelism is on, or sequence and tensor parallelism together.
    """
    if parallelism_config is None:
        return
    if parallelism_config.cp_size > 1:
        raise ValueError(
            f"cp_size={parallelism_config.cp_size}: context parallelism replaces every attention mask by a causal "
            "one, so branches would see each other. Set cp_size=1, and share rows with sp_size instead."
        )
    if parallelism_config.tp_size > 1 and getattr(parallelism_config, "sp_size", 1) > 1:
        raise ValueError(
            f"tp_size={parallelism_config.tp_size} and sp_size={parallelism_config.sp_size} both divide the heads of "
            "attention. Set one of them to 1."
        )


def check_run(trainer: Any) -> None:
    """
    Refuse a run on several processes that would train something else than was asked for.

    Args:
        trainer (`transformers.Trainer`):
            Trainer with its accelerator.

    Raises:
        `ValueError`: If its engine or its kind of parallelism does not work with trees.
    """
    check_parallelism(trainer.accelerator.parallelism_config)  # may come from accelerate's own configuration
    check_engine(trainer.args, trainer.accelerator)
    check_tensor_parallelism(trainer)
    check_recurrent_layers(trainer)


def check_recurrent_layers(trainer: Any) -> None:
    """
    Refuse to shard recurrent layers by ZeRO-3: ranks would wait for one another forever, or mix up parameters.

    It gathers parameters whenever a module runs, on all ranks at once. The parts of a recurrent layer run as often as
    the row of a rank has pieces.

    Args:
        trainer (`transformers.Trainer`):
            Trainer with its model and accelerator.

    Raises:
        `ValueError`: If the model has recurrent layers and several processes shard its parameters by ZeRO-3.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage < 3 or trainer.accelerator.num_processes == 1:
        return
    recurrent = path_dependent_layer_names(without_adapters(trainer.model))
    if recurrent:
        raise ValueError(
            f"ZeRO-3 does not work with {', '.join(recurrent)}: it gathers parameters as often as a layer's parts "
            "run, which differs between ranks. Shard the model with FSDP2, or use ZeRO-2."
        )


def check_tensor_parallelism(trainer: Any) -> None:
    """
    Refuse what ranks that share the layers of a model get wrong.

    Args:
        trainer (`transformers.Trainer`):
            Trainer with its model.

    Raises:
        `ValueError`: If layers are divided in a way that has not been shown to be exact, or a setting does not work
            with it.
    """
    args, base = trainer.args, without_adapters(trainer.model)
    sizes = getattr(base.config, "distributed_config", None)
    num_stages = getattr(sizes, "pp_size", None) or 1
    if num_stages > 1:
        raise ValueError(
            f"pp_size={num_stages}: a pipeline hands on hidden states without the tree. Leave it out, and shard the "
            "model with FSDP or ZeRO-3."
        )
    if trainer.get_tp_size() == 1:
        return
    summed_per_batch = "replicated_with_grad_allreduce" in (getattr(base, "tp_plan", None) or {}).values()
    recurrent = path_dependent_layer_names(base)
    for refused, what, way_out in (
        (
            summed_per_batch and args.gradient_accumulation_steps > 1,
            "gradient_accumulation_steps above 1 in this model: transformers sums the gradients of its q_norm and "
            "k_norm over ranks after each batch, and again with the next one",
            "Set it to 1, and raise per_device_train_batch_size",
        ),
        (sizes is None, f"transformers {transformers.__version__}", "Upgrade to 5.24"),
        (args.wave_tokens is not None, "wave_tokens", "Leave it out, and set gradient_checkpointing"),
        (bool(recurrent), f"{', '.join(recurrent)}, whose states are not divided", "Shard with FSDP or ZeRO-3"),
    ):
        if refused:
            raise ValueError(f"Tensor parallelism (tp_size) does not work with {what}. {way_out}.")


def check_engine(args: Any, accelerator: Any) -> None:
    """
    Refuse a run that asked for DeepSpeed or FSDP and got another engine, tensor parallelism by DeepSpeed, and
    processes that do not know of each other.

    Args:
        args (`transformers.TrainingArguments`):
            Arguments of the run.
        accelerator (`accelerate.Accelerator`):
            Accelerator of the run.

    Raises:
        `ValueError`: If accelerate silently chose something else, or the engine shards layers.
    """
    kind = accelerator.distributed_type
    asks_for_fsdp = bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    for asked, name, expected in (
        (bool(args.deepspeed), "DeepSpeed", DistributedType.DEEPSPEED),
        (asks_for_fsdp and accelerator.num_processes > 1, "FSDP", DistributedType.FSDP),
    ):
        if asked and kind != expected:
            raise ValueError(
                f"The run asks for {name}, and accelerate chose {kind.value}, which would train something else. Check "
                "the launch: `accelerate launch --cpu`, ACCELERATE_USE_CPU and use_cpu=True switch engines off."
            )
    plugin = accelerator.state.deepspeed_plugin
    tensor_parallel = {} if plugin is None else plugin.deepspeed_config.get("tensor_parallel", {})
    if tensor_parallel.get("autotp_size", 0) > 1:
        raise ValueError(
            f"autotp_size={tensor_parallel['autotp_size']}: tensor parallelism has not been shown to train a tree "
            "exactly. Leave tensor_parallel out of the DeepSpeed configuration, and shard the model with ZeRO-3."
        )
    if kind == DistributedType.NO and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, and accelerate trains each one alone. Set "
            "ddp_backend, or use_cpu=True on a machine without a GPU."
        )


def check_sequence_parallelism(trainer: Any) -> None:
    """
    Refuse what shared rows cannot honour.

    Args:
        trainer (`SinglePassSFTTrainer`):
            Trainer whose accelerator has `sp_size` above 1, its model under tree attention.

    Raises:
        `ValueError`: If a setting or the model does not work with sequence parallelism.
    """
    args = trainer.args
    recurrent = path_dependent_layer_names(without_adapters(trainer.model))
    for refused, what, way_out in (
        (trainer.accelerator.distributed_type != DistributedType.DEEPSPEED, "another engine than DeepSpeed", "Use it"),
        (args.per_device_train_batch_size > 1, "per_device_train_batch_size above 1", "Set it to 1, and accumulate"),
        (args.fp16, "fp16, whose loss scale hides wrong gradients", "Use bf16"),
        (trainer.aux_loss_enabled, "a load-balancing loss, which needs whole rows", "Set router_aux_loss_coef=0"),
        (bool(recurrent), f"{', '.join(recurrent)}, which run along a whole row", "Train without sp_size"),
    ):
        if refused:
            raise ValueError(f"Sequence parallelism (sp_size) does not work with {what}. {way_out}.")


def check_loss_is_divided(trainer: Any) -> None:
    """
    Refuse a loss that the model divides itself, by the tokens of each batch: steps would not be means over tokens.

    Args:
        trainer (`trl.SFTTrainer`):
            Trainer, as its own `__init__` left it.

    Raises:
        `ValueError`: If TRL takes such a loss from the model; since 1.15, it computes its own.
    """
    if trainer.model_accepts_loss_kwargs or Version(trl.__version__) >= Version("1.15"):
        return
    name = type(without_adapters(trainer.model)).__name__
    raise ValueError(
        f"{name} divides its loss by the tokens of each batch, so that trl {trl.__version__} trains a mean of batch "
        "means. Upgrade to trl>=1.15, which computes the loss of each token itself."
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
        raise ValueError(f"Loss weights other than 1 need trl>=1.15, found {trl.__version__}. Upgrade trl.")
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
