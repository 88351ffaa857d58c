"""What engines that shard a model must be told about its layers, before they take it over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import Accelerator
from transformers import PreTrainedModel, logging

from ..engine.enable import without_adapters
from .tensor_parallel import sum_gradients_once
from .zero3_leaves import make_leaves


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

PREFETCHED = "stage3_prefetch_bucket_size"  # of ZeRO-3


def prepare_sharding(model: PreTrainedModel | PeftModel, accelerator: Accelerator, tp_size: int = 1) -> None:
    """
    Choose the layers that ZeRO-3 gathers and that FSDP2 shards as a whole, and correct tensor parallelism.

    Other engines are left alone. Takes the model before the engine does; `tp_size` ranks share its layers.
    """
    make_leaves(model, accelerator)
    _leave_out_absent_layers(without_adapters(model), accelerator)
    if tp_size > 1:
        sum_gradients_once(without_adapters(model))


def _leave_out_absent_layers(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """
    Let FSDP2 shard the layers that the model has, where nobody has named others.

    transformers 5.24 names the blocks of the encoder of images for text models as well (Qwen3.5), and accelerate 1.15
    stops if a named layer is not in the model.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap is not None:
        return
    present = {type(module).__name__ for module in model.modules()}
    named = set(model._no_split_modules or ())
    if named & present:
        plugin.transformer_cls_names_to_wrap = sorted(named & present)


def stop_prefetching(accelerator: Accelerator) -> None:
    """
    Turn off prefetching by ZeRO-3 for rows that run in parts, unless the configuration asks for it by a number.

    DeepSpeed prefetches by default. It then frees parameters that a backward in another order still needs (0.19).
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return
    settings = plugin.deepspeed_config["zero_optimization"]
    if settings.get(PREFETCHED, "auto") == "auto":
        settings[PREFETCHED] = 0
        logger.info(f"{PREFETCHED} is 0: where a row runs in parts, ZeRO-3 cannot fetch parameters ahead.")
