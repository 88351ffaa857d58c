"""What is known of a run when its settings are checked: the record that the predicates in `refusals.py` read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig, SFTConfig

from ..attention.registry import TREE_ATTENTION
from ..engine.enable import without_adapters
from ..recurrent.introspection import path_dependent_layers
from ..waves.engines import SHARDED
from .adapters import random_adapters


if TYPE_CHECKING:
    from peft import PeftModel

PREFETCHED = "stage3_prefetch_bucket_size"  # of ZeRO-3
_KNOWN_ENGINES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, *SHARDED)


@dataclass(frozen=True)
class Situation:
    """The arguments of a run, and what else of it is there already. What is not known is not refused."""

    args: SFTConfig | DPOConfig
    model: PreTrainedModel | PeftModel | None = None  # as it will be trained
    accelerator: Accelerator | None = None
    compute_loss_func: Callable[..., object] | None = None

    @property
    def setting(self) -> str:
        """The setting by which rows run in parts."""
        return "max_row_tokens" if self.args.wave_tokens is None else "wave_tokens"

    # The model -------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> PreTrainedModel | None:
        """The model without its adapters."""
        return None if self.model is None else without_adapters(self.model)

    def of_text_config(self, name: str) -> object:
        """Return a setting of the model's text configuration, `None` where it has none of that name."""
        return None if self.base is None else getattr(self.base.config.get_text_config(), name, None)

    def dropout_layers(self) -> Iterator[str]:
        """Yield layers of the model that drop units."""
        for name, module in () if self.model is None else self.model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
                yield f"Dropout ({name})"

    def random_adapters(self) -> Iterator[str]:
        """Yield adapters that draw random numbers other than by a dropout layer."""
        return iter(()) if self.model is None else random_adapters(self.model)

    def uses_flex_attention(self) -> bool:
        """Whether the model's layers call FlexAttention."""
        return self.of_text_config("_attn_implementation") == TREE_ATTENTION["flex_attention"]

    def layers_of_unknown_memory(self) -> Iterator[str]:
        """Yield layers that run over whole paths, whose memory a wave does not bound."""
        for layer, mode in {} if self.base is None else path_dependent_layers(self.base).items():
            if not mode.starts_from_state and mode.reach is None:
                yield type(layer).__name__

    def recurrent_layers(self) -> Iterator[str]:
        """Yield the classes of the model's recurrent and convolutional layers."""
        for layer in {} if self.base is None else path_dependent_layers(self.base):
            yield type(layer).__name__

    # The engine ------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> DistributedType | None:
        """What accelerate runs the model with."""
        return None if self.accelerator is None else self.accelerator.distributed_type

    def unknown_engine(self) -> str | None:
        """Return the name of an engine of which nobody knows how it accumulates gradients."""
        return self.engine.value if self.engine is not None and self.engine not in _KNOWN_ENGINES else None

    def uses_fsdp1(self) -> bool:
        """Whether parameters are sharded by the first version of FSDP."""
        return self.accelerator is not None and self.engine == DistributedType.FSDP and not self.accelerator.is_fsdp2

    @property
    def zero_stage(self) -> int:
        """The stage of DeepSpeed's ZeRO, 0 without DeepSpeed."""
        if self.accelerator is None or self.engine != DistributedType.DEEPSPEED:
            return 0
        stage: int = self.accelerator.state.deepspeed_plugin.zero_stage
        return stage

    @property
    def deepspeed_config(self) -> Mapping[str, Mapping[str, object]]:
        """The configuration of DeepSpeed, empty without it."""
        plugin = None if self.accelerator is None else self.accelerator.state.deepspeed_plugin
        return {} if plugin is None else plugin.deepspeed_config

    def prefetches(self) -> bool:
        """Whether ZeRO-3 fetches parameters ahead."""
        return self.zero_stage == 3 and self.deepspeed_config.get("zero_optimization", {}).get(PREFETCHED) != 0

    def shards_the_model(self) -> bool:
        """Whether a rank cannot run the model by itself: what it measured would be of a shard."""
        shares_rows = getattr(getattr(self.accelerator, "parallelism_config", None), "sp_size", 1) > 1
        return self.zero_stage == 3 or shares_rows or self.engine == DistributedType.FSDP
