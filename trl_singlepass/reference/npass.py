"""N-pass: one ordinary forward and backward per sample, the reference for the single pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..attention.registry import set_text_attention
from ..data.collator import LoadImages
from ..engine.check.checked_model import get_device, sample_inputs
from ..trees.sample import Sample


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

STOCK_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, slots=True, eq=False)
class LossAndGradients:
    """Loss of a set of samples, in total and per token, and the gradients of all trainable parameters."""

    # Σ weight · nll ÷ Σ weight over the trained tokens of all samples, plus the weighted load-balancing loss if the
    # model's config asks for it
    loss: float
    # for each sample, the negative log-likelihoods of its trained tokens, in order: float64 on CPU, of shape
    # `(num_trained_tokens,)`
    token_losses: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor]  # by parameter name; zeros if the loss does not depend on it
    num_tokens: int  # in all forward passes
    seconds: float  # wall time of forward and backward


def npass_loss_and_gradients(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    load_images: LoadImages | None = None,
    on_pass: Callable[[], object] = lambda: None,
) -> LossAndGradients:
    """
    Compute loss and gradients with one ordinary forward and backward per sample, without trees.

    The model keeps its mode (call `eval()` to turn dropout off) and runs on its `attn_implementation` if that is
    transformers' own, else on SDPA (eager for models without it). `param.grad` is not touched. A mixture of experts
    with `output_router_logits=True` adds its load-balancing loss over all samples in one padded batch, as the stock
    `SFTTrainer` does. Each sample encodes its own images; `on_pass` is called after each. Without a token of positive
    weight, this raises `ValueError`.
    """
    total_weight = sum(float(sample.loss_weights.sum()) for sample in samples)
    if total_weight <= 0:
        raise ValueError("The loss is a mean over trained tokens, but no token of the samples has a weight above 0.")
    parameters = trainable_parameters(model)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    token_losses, loss = [], 0.0
    with stock_attention(model), stopwatch(model) as seconds:
        for sample in samples:
            nll, weights = _forward(model, sample, load_images)
            token_losses.append(nll.detach().double().cpu())
            loss += _accumulate((nll * weights).sum() / total_weight, parameters, gradients)
            on_pass()
        if has_auxiliary_loss(model):
            loss += _accumulate(_auxiliary_loss(model, samples, load_images), parameters, gradients)
    num_tokens = sum(map(len, samples))
    return LossAndGradients(loss, tuple(token_losses), gradients, num_tokens, seconds())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training would change, by name; for LoRA, those of the adapter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def has_auxiliary_loss(model: PreTrainedModel) -> bool:
    """Return whether the model's config adds the load-balancing loss of its experts to the loss."""
    return bool(getattr(get_text_config(model), "output_router_logits", False))


def get_text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of the language model, which may be part of a multimodal one."""
    return model.config.get_text_config()


def compute_gradients(loss: torch.Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return gradients by parameter name without touching `param.grad`; zeros for parameters that have no effect."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the model on transformers' own attention, then restore its implementation."""
    before = get_text_config(model)._attn_implementation
    stock = before in STOCK_ATTENTION or "/" in before  # a slash names a kernel on the Hub
    if not stock:
        set_text_attention(model, "sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        if not stock:
            set_text_attention(model, before)


@contextmanager
def stopwatch(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since entry, after waiting for the device."""
    device = get_device(model)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    yield lambda: now() - start


def _forward(
    model: PreTrainedModel, sample: Sample, load_images: LoadImages | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods and weights of the trained tokens, each of shape `(num_trained_tokens,)`."""
    device = get_device(model)
    trained = torch.from_numpy(np.flatnonzero(sample.loss_weights)).to(device)
    inputs = sample_inputs(model, [sample], load_images)
    logits = model(**inputs, use_cache=False).logits[0, trained - 1]
    nll = F.cross_entropy(logits.float(), inputs["input_ids"][0, trained], reduction="none")
    return nll, torch.tensor(sample.loss_weights, device=device)[trained].to(nll.dtype)


def _auxiliary_loss(model: PreTrainedModel, samples: Sequence[Sample], load_images: LoadImages | None) -> torch.Tensor:
    inputs = sample_inputs(model, samples, load_images)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    outputs = model(**inputs, output_router_logits=True, use_cache=False)
    weighted: torch.Tensor = get_text_config(model).router_aux_loss_coef * outputs.aux_loss
    return weighted


def _accumulate(loss: torch.Tensor, parameters: dict[str, nn.Parameter], gradients: dict[str, torch.Tensor]) -> float:
    for name, part in compute_gradients(loss, parameters).items():
        gradients[name] += part
    return float(loss.detach())
