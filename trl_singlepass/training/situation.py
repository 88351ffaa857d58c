"""What is known of a run when its settings are checked, and what `refusals.py` asks about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import transformers
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available
from trl import DPOConfig, SFTConfig

from ..data.dataset_format import column_names, holds_rows
from ..engine.enable import without_adapters
from ..images.reading import image_module
from ..recurrent.decoder import get_decoder
from ..recurrent.measurement import path_dependent_layer_names, path_dependent_layers


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

Found: TypeAlias = str | bool | None
"""Whether a setting is refused, or the words for it with its value."""


@dataclass(frozen=True)
class Situation:
    """The arguments of a run, and what else of it is there already. What is not known yet is not refused."""

    args: SFTConfig | DPOConfig
    model: str | PreTrainedModel | PeftModel | None = None
    accelerator: Accelerator | None = None
    _: KW_ONLY
    dataset: Dataset | IterableDataset | None = None  # before it is prepared
    packing: bool = False
    compute_loss_func: Callable[..., object] | None = None
    accepts_loss_kwargs: bool = True  # whether the model takes the divisor of its loss as an argument
    peft_config: PeftConfig | None = None
    tp_size: int = 1  # ranks that share the layers of the model

    @property
    def setting(self) -> str:
        """The setting by which rows run in parts."""
        return "max_row_tokens" if self.args.wave_tokens is None else "wave_tokens"

    @property
    def base(self) -> PreTrainedModel | None:
        """The model without its adapters, once it is loaded."""
        return None if self.model is None or isinstance(self.model, str) else without_adapters(self.model)

    @property
    def engine(self) -> str:
        """What accelerate calls that by which it runs the model, empty before it has chosen."""
        return "" if self.accelerator is None else str(self.accelerator.distributed_type.value)

    def size(self, name: str) -> int:
        """Return how many ranks share something: `cp_size`, `sp_size` or `tp_size`."""
        # The accelerator's may come from a configuration of its own.
        config = self.args.parallelism_config if self.accelerator is None else self.accelerator.parallelism_config
        return getattr(config, name, None) or 1

    def has(self, setting: str) -> Found:
        """Return whether a setting, `name` or `name=value`, is set."""
        name, _, value = setting.partition("=")
        if name.endswith("p_size"):
            return self.shared_by(name)
        given = self.compute_loss_func if name == "compute_loss_func" else getattr(self.args, name, None)
        return repr(given) == value if value else given not in (None, False, 0)

    # Settings --------------------------------------------------------------------------------------------------------

    def lacks_flash_attention(self) -> Found:
        """Neither the package of the kernel is installed, nor `kernels`, with which it comes from the Hub."""
        checks = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
        implementation = (self.args.model_init_kwargs or {}).get("attn_implementation")
        is_there = implementation not in checks or checks[implementation]() or is_kernels_available()
        return not is_there and f"attn_implementation={implementation!r}"

    def differs(self, setting: str, expected: object) -> Found:
        """Return a setting with its value if that is not the expected one."""
        given = getattr(self.args, setting)
        return given != expected and f"{setting}={given!r}"

    def dispatches_batches(self) -> Found:
        """The first process reads the batches of all; streams of conversations have a loader of their own."""
        is_own_loader = isinstance(self.args, SFTConfig) and isinstance(self.dataset, IterableDataset)
        is_dispatched = bool(self.args.accelerator_config.dispatch_batches) and not is_own_loader
        return is_dispatched and "accelerator_config={'dispatch_batches': True}"

    def trains_users(self) -> Found:
        """`assistant_only_loss=False` is asked for: TRL's own default is `False`, and means that nobody did."""
        default = self.args.__dataclass_fields__["assistant_only_loss"].default
        return default is None and self.args.assistant_only_loss is False

    def skips_preparation(self) -> Found:
        """Examples are to be trained as they are, and are not rows."""
        skips = bool((self.args.dataset_kwargs or {}).get("skip_prepare_dataset"))
        return skips and not (self.dataset is not None and holds_rows(column_names(self.dataset)))

    def beside_turn_weights(self, setting: str) -> Found:
        """Return a setting and the one that weighs the turns of a trajectory, if there is one."""
        discounts = getattr(self.args, "turn_discount", None) is not None
        weighs = discounts or getattr(self.args, "turn_mean", False)
        name = "turn_discount" if discounts else "turn_mean"
        return weighs and f"{setting}={getattr(self.args, setting)!r} with {name}"

    def updates_during_backward(self) -> Found:
        """The optimizer updates parameters as their gradients come."""
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        return (optimizer in ("lomo", "adalomo") or "layerwise" in optimizer) and f"optim={optimizer!r}"

    # The model and its adapters --------------------------------------------------------------------------------------

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of the model and of its adapters."""
        return iter(()) if self.model is None or isinstance(self.model, str) else self.model.named_modules()

    def of_text_config(self, name: str) -> object:
        """Return a setting of the model's text configuration, `None` where it has none of that name."""
        return None if self.base is None else getattr(self.base.config.get_text_config(), name, None)

    def dropout(self) -> Found:
        """Return a layer of the model that drops units."""
        layers = (name for name, module in self.modules() if _is_dropout(module) and module.p)
        return next((f"Dropout ({name})" for name in layers), None)

    def recurrent(self) -> Found:
        """Return the recurrent and convolutional layers of the model."""
        return ", ".join([] if self.base is None else path_dependent_layer_names(self.base))

    def memory_is_unknown(self) -> Found:
        """Return a layer that runs over whole paths, whose memory a wave does not bound."""
        layers = {} if self.base is None else path_dependent_layers(self.base)
        unbounded = (layer for layer, mode in layers.items() if not mode.starts_from_state and mode.reach is None)
        return next((type(layer).__name__ for layer in unbounded), None)

    def trains_an_encoder(self) -> bool:
        """Whether a part of the model that reads images is trained."""
        module = None if self.base is None else image_module(self.base)
        if self.base is None or module is None:
            return False
        of_text = {id(parameter) for parameter in get_decoder(self.base).parameters()}
        return any(parameter.requires_grad and id(parameter) not in of_text for parameter in module.parameters())

    def adapter(self, is_refused: Callable[[PeftConfig], bool]) -> Found:
        """Return an adapter that is refused, of those that the model has or gets."""
        given = [] if self.peft_config is None else [self.peft_config]
        configs = (*given, *getattr(self.model, "peft_config", {}).values())
        return next((type(config).__name__ for config in configs if is_refused(config)), None)

    def hides_the_model(self) -> Found:
        """Return a wrapper of adapters that does not give the model inside."""
        is_wrapper = bool(getattr(self.model, "peft_config", {})) and not isinstance(self.model, PreTrainedModel)
        return is_wrapper and not hasattr(self.model, "get_base_model") and type(self.model).__name__

    def random_adapter(self) -> Found:
        """Return the setting with which an adapter draws random numbers in training other than by a dropout layer."""
        # `….lora_dropout.default`: what a layer does, its own probability says, which TRL may have set to 0.
        layers = {part for name, module in self.modules() if _is_dropout(module) for part in name.split(".")}
        for config in getattr(self.model, "peft_config", {}).values():
            name = type(config).__name__
            for setting, value in vars(config).items():  # of ranks (LoHa), blocks (OFT) or modules
                if "dropout" in setting and setting not in layers and isinstance(value, float) and value > 0:
                    return f"{name}({setting}={value:g})"
            if getattr(config, "monteclora_config", None) is not None:
                return f"{name}(monteclora_config=…)"
            if config.peft_type == "PVERA":
                return name
        return None

    # Engines ---------------------------------------------------------------------------------------------------------

    def deepspeed_is_off(self) -> Found:
        """The run asks for DeepSpeed and gets something else."""
        is_off = bool(self.args.deepspeed) and self.engine not in ("", "DEEPSPEED")
        return is_off and f"deepspeed, of which accelerate made {self.engine},"

    def fsdp_is_off(self) -> Found:
        """The run asks for FSDP, on several ranks, and gets something else."""
        is_asked_for = bool(self.args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        is_off = is_asked_for and num_launched() > 1 and self.engine not in ("", "FSDP")
        return is_off and f"fsdp, of which accelerate made {self.engine},"

    def fsdp_is_on_a_cpu(self) -> Found:
        """FSDP is off because the ranks have no GPU."""
        is_cpu = self.accelerator is not None and self.accelerator.device.type == "cpu"
        return is_cpu and self.fsdp_is_off() and "fsdp on a CPU"

    def of_deepspeed(self, section: str, name: str) -> object:
        """Return a setting of DeepSpeed's configuration, `None` where it has none of that name."""
        plugin = None if self.accelerator is None else self.accelerator.state.deepspeed_plugin
        return None if plugin is None else plugin.deepspeed_config.get(section, {}).get(name)

    def divides_layers_by_deepspeed(self) -> Found:
        """DeepSpeed is to divide the layers of the model among ranks."""
        size = self.of_deepspeed("tensor_parallel", "autotp_size")
        return isinstance(size, int) and size > 1 and f"autotp_size={size}"

    def zero3(self) -> bool:
        """Whether DeepSpeed shards the parameters."""
        if self.accelerator is None or self.engine != "DEEPSPEED":
            return False
        return bool(self.accelerator.state.deepspeed_plugin.zero_stage == 3)

    def adds_to_older_gradients(self) -> bool:
        """Whether DeepSpeed adds what comes after the first backward of a step to gradients of the step before."""
        offload = self.of_deepspeed("zero_optimization", "offload_optimizer")
        return self.zero3() or (isinstance(offload, dict) and offload.get("device", "none") != "none")

    def shards_the_model(self) -> bool:
        """Whether a rank cannot run the model by itself."""
        return self.zero3() or self.size("sp_size") > 1 or self.engine == "FSDP"

    def shared_by(self, name: str) -> Found:
        """Return a size with its value if several ranks share something."""
        size = self.tp_size if name == "tp_size" and self.tp_size > 1 else self.size(name)
        return size > 1 and f"{name}={size}"

    def pipeline(self) -> Found:
        """Return the number of stages of a pipeline that transformers made of the model."""
        sizes = None if self.base is None else getattr(self.base.config, "distributed_config", None)
        stages = getattr(sizes, "pp_size", None) or 1
        return stages > 1 and f"pp_size={stages}"

    def divided_by_older_transformers(self) -> Found:
        """transformers has no configuration of its own by which ranks share layers."""
        is_old = self.base is not None and getattr(self.base.config, "distributed_config", None) is None
        return is_old and f"transformers {transformers.__version__}"

    def saves_a_divided_optimizer(self) -> Found:
        """The optimizer of a model that transformers sharded as it loaded it is to be saved."""
        is_sharded = bool(getattr(self.model, "is_distributed_loading_by_transformers", False))
        saves = self.args.save_strategy != "no" and not self.args.save_only_model
        return is_sharded and saves and f"save_strategy={self.args.save_strategy.value!r}"

    def heads_are_unnamed(self) -> Found:
        """The configuration of the model has not the names under which DeepSpeed looks for heads."""
        config = None if self.base is None else self.base.config.get_text_config()
        names = ("num_attention_heads", "num_key_value_heads")
        unnamed = [name for name in names if config is not None and not hasattr(config, name)]
        return bool(unnamed) and f"a model without {' and '.join(unnamed)}"


def before(library: ModuleType, release: str) -> Found:
    """Return a library with its release if that is an older one."""
    return Version(library.__version__) < Version(release) and f"{library.__name__} {library.__version__}"


def num_launched() -> int:
    """Return the number of processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)
