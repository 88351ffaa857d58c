"""Settings under which waves would not train what the whole row trains: each refused by name, with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import trl
from accelerate.utils import DistributedType
from packaging.version import Version
from torch import nn

from ..attention.registry import TREE_ATTENTION
from ..recurrent.layer_kinds import path_dependent_layer_names
from ..waves.engines import SHARDED
from .model import without_adapters


def check_waves(trainer: Any) -> None:
    """
    Refuse what waves cannot honour.

    Args:
        trainer (`SinglePassSFTTrainer`):
            Trainer with `wave_tokens`, its model under tree attention.

    Raises:
        `ValueError`: If a setting, the model or the engine does not work with waves.
    """
    setting = "wave_tokens='auto'" if trainer.args.wave_tokens == "auto" else "wave_tokens"
    for what, why, way_out in _refused(trainer):
        raise ValueError(f"{what} does not work with {setting}: {why}. {way_out}, or set wave_tokens=None.")


def _refused(trainer: Any) -> Iterator[tuple[str, str, str]]:
    args, base = trainer.args, without_adapters(trainer.model)
    if Version(trl.__version__) < Version("1.16"):
        yield f"trl {trl.__version__}", "it has no fused head that takes shifted labels", "Upgrade to trl>=1.16"
    if args.label_smoothing_factor:
        yield "label_smoothing_factor", "it reads the logits of the whole row", "Set it to 0"
    if trainer.compute_loss_func is not None:
        yield "compute_loss_func", "it reads the logits of the whole row", "Leave it unset"
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha", "history would get other noise each time that it runs", "Leave it unset"
    if args.torch_compile:
        yield "torch_compile", "waves add up gradients where a compiled graph cannot see them", "Turn it off"
    if args.activation_offloading:
        yield "activation_offloading", "it expects one forward before each backward", "Turn it off"
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in ("lomo", "adalomo") or "layerwise" in optimizer:
        yield f"optim={optimizer!r}", "it updates parameters during backward, between waves", "Choose another"
    recurrent = path_dependent_layer_names(base)
    if recurrent and args.wave_tokens == "auto":
        yield recurrent[0], "its activations are not counted", "Set a number of tokens"
    yield from _refused_models(trainer.model, base)
    yield from _refused_engines(trainer.accelerator)


def _refused_models(model: Any, base: Any) -> Iterator[tuple[str, str, str]]:
    dropout = sorted({name for name, module in model.named_modules() if getattr(module, "p", 0) and _drops(module)})
    if dropout:
        yield f"Dropout ({dropout[0]})", "history would drop other units each time that it runs", "Set it to 0"
    if getattr(base.config.get_text_config(), "router_jitter_noise", 0):
        yield "router_jitter_noise", "history would get other noise each time that it runs", "Set it to 0"
    implementation = base.config.get_text_config()._attn_implementation
    if implementation != TREE_ATTENTION["sdpa"]:
        known = {name: given for given, name in TREE_ATTENTION.items()}
        name = known.get(implementation, implementation)
        yield f"attn_implementation={name!r}", "its kernel reads keys from one row", "Load the model with 'sdpa'"


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)


def _refused_engines(accelerator: Any) -> Iterator[tuple[str, str, str]]:
    kind = accelerator.distributed_type
    works = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, *SHARDED)
    if kind not in works:
        yield f"{kind.value}", "how it accumulates gradients is not known", "Train with DDP, DeepSpeed or FSDP2"
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        yield "FSDP version 1", "it flattens parameters between backwards", "Set fsdp_version=2"
    if kind == DistributedType.DEEPSPEED and _fetches_ahead(accelerator.state.deepspeed_plugin):
        yield (
            "ZeRO-3 with stage3_prefetch_bucket_size above 0",
            "it fetches parameters in the order of the first step, and the number of waves changes from row to row",
            "Set it to 0",
        )
    if getattr(accelerator.parallelism_config, "sp_size", 1) > 1:
        yield "sp_size", "keys and values of a history would be on other ranks than its branches", "Set it to 1"


def _fetches_ahead(plugin: Any) -> bool:
    """Whether DeepSpeed prefetches; it then frees parameters that a backward in another order still needs (0.19)."""
    settings = plugin.deepspeed_config.get("zero_optimization", {})
    return bool(plugin.zero_stage == 3 and settings.get("stage3_prefetch_bucket_size") != 0)
