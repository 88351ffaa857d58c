"""Adapters of PEFT that a single pass refuses by name: wherever it can, the measured check refuses them instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def check_adapters(model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> None:
    """
    Refuse adapters that rows or TRL's fused head cannot serve, and those whose errors the measured check may not see.

    It refuses all others that mix the tokens of a row, before the first step.
    """
    configs = getattr(model, "peft_config", {})
    if configs and not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise ValueError(
            f"{type(model).__name__} hides the model that TRL's fused head replaces the forward of. Use a PeftModel: "
            "get_peft_model(model, peft_config), without mixed=True."
        )
    for config in (peft_config, *configs.values()):
        for why, way_out in _refused_adapters(config):
            raise ValueError(f"{type(config).__name__} {why}. {way_out}.")


def _refused_adapters(config: PeftConfig | None) -> Iterator[tuple[str, str]]:
    """Yield what a single pass cannot honour of an adapter, and the way out."""
    if getattr(config, "is_prompt_learning", False):
        yield (
            "adds virtual tokens in front of the row, which belong to no branch of the tree",
            "Use an adapter that adds no tokens, such as LoraConfig",
        )
    if getattr(config, "is_adaption_prompt", False):
        yield (
            "calls the forward that the model had before TRL gave it a fused head, so TRL's trainers get no "
            "log-probabilities from it",
            "Use another adapter, such as LoraConfig",
        )
    if getattr(config, "alora_invocation_tokens", None):
        yield (
            "with alora_invocation_tokens acts from the last place on where a row has these tokens, and each turn of "
            "a row has them elsewhere",
            "Leave alora_invocation_tokens out, or train one sample per turn (N-pass) with TRL's SFTTrainer",
        )
    # The check measures outputs, and here only gradients are wrong.
    if getattr(getattr(config, "velora_config", None), "init_type", "random") != "random":
        yield (
            "with velora_config computes gradients from a mean over all tokens of a row, so that those of a turn "
            "depend on what shares its row",
            "Set init_type='random' in VeloraConfig",
        )
    kind = getattr(config, "peft_type", None)
    if kind == "POLY":
        yield (
            "needs the task of each example (task_ids), which rows do not have",
            "Use another adapter, such as LoraConfig",
        )
    if kind == "XLORA":
        yield (
            "reads the hidden states of a first pass, which TRL's fused head does not return",
            "Use another adapter, such as LoraConfig, or train in a loop of your own with enable_tree(model)",
        )


def random_adapters(model: PreTrainedModel | PeftModel) -> Iterator[str]:
    """Yield the settings with which adapters draw random numbers in training other than by a dropout layer."""
    # `….lora_dropout.default`: what a layer does, its own probability says, which TRL may have set to 0.
    dropout = [name for name, module in model.named_modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    layers = {part for name in dropout for part in name.split(".")}
    for config in getattr(model, "peft_config", {}).values():
        name = type(config).__name__
        for setting, value in vars(config).items():  # of ranks (LoHa), blocks (OFT) or modules
            if "dropout" in setting and setting not in layers and isinstance(value, float) and value > 0:
                yield f"{name}({setting}={value:g})"
        if getattr(config, "monteclora_config", None) is not None:
            yield f"{name}(monteclora_config=…)"
        if config.peft_type == "PVERA":
            yield name
