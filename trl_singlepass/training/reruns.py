"""What does not work where the tokens of a batch run more than once: in waves, and in parts of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import nn
from transformers import PreTrainedModel, logging
from trl import DPOConfig, SFTConfig

from ..engine.enable import without_adapters
from ..waves.engines import SHARDED
from .adapters import random_adapters


if TYPE_CHECKING:
    from peft import PeftModel

Refusal: TypeAlias = tuple[str, str, str]
"""What is refused, why, and what to do instead."""

logger = logging.get_logger(__name__)
_PREFETCHED = "stage3_prefetch_bucket_size"


def refused_where_tokens_run_twice(
    model: PreTrainedModel | PeftModel, args: SFTConfig | DPOConfig, *, tokens: str, parts: str
) -> Iterator[Refusal]:
    """
    Yield settings and layers that do not go with several forwards and backwards per batch. For the error, `tokens` is
    what runs more than once, and `parts` what a batch runs in.
    """
    if args.activation_offloading:
        yield "activation_offloading", "it expects one forward before each backward", "Turn it off"
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in ("lomo", "adalomo") or "layerwise" in optimizer:
        yield f"optim={optimizer!r}", f"it updates parameters during backward, between {parts}", "Choose another"
    noise = f"{tokens} would get different noise each time it runs"
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha", noise, "Leave it unset"
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            yield f"Dropout ({name})", f"{tokens} would drop different units each time it runs", "Set it to 0"
    for adapter in random_adapters(model):
        yield adapter, noise, "Use an adapter that draws no random numbers"
    if getattr(without_adapters(model).config.get_text_config(), "router_jitter_noise", 0):
        yield "router_jitter_noise", noise, "Set it to 0"


def refused_engines(accelerator: Accelerator) -> Iterator[Refusal]:
    """Yield what of an engine does not work there."""
    kind = accelerator.distributed_type
    works = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, *SHARDED)
    if kind not in works:
        yield f"{kind.value}", "how it accumulates gradients is not known", "Train with DDP, DeepSpeed or FSDP2"
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        yield "FSDP version 1", "it flattens parameters between backward passes", "Set fsdp_version=2"
    if kind == DistributedType.DEEPSPEED and _prefetches(accelerator.state.deepspeed_plugin):
        yield (
            f"ZeRO-3 with {_PREFETCHED} above 0",
            "it fetches parameters in the order of the first step, and the number of waves changes from row to row",
            "Set it to 0 or 'auto'",
        )


def stop_prefetching(accelerator: Accelerator) -> None:
    """
    Turn off prefetching by ZeRO-3 for rows that run in parts, unless the configuration asks for it by a number.

    DeepSpeed prefetches by default. It then frees parameters that a backward in another order still needs (0.19).
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return
    settings = plugin.deepspeed_config["zero_optimization"]
    if settings.get(_PREFETCHED, "auto") == "auto":
        settings[_PREFETCHED] = 0
        logger.info(f"{_PREFETCHED} is 0: where a row runs in parts, ZeRO-3 cannot fetch parameters ahead.")


def _prefetches(plugin: DeepSpeedPlugin) -> bool:
    settings = plugin.deepspeed_config.get("zero_optimization", {})
    return bool(plugin.zero_stage == 3 and settings.get(_PREFETCHED) != 0)
