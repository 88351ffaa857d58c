"""N-pass: one ordinary forward per sample. What every other way of training is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..trees.sample import Sample


STOCK_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, slots=True, eq=False)
class LossAndGradients:
    """
    Loss of some samples, taken apart by token, and the gradients of all trainable parameters.

    Args:
        loss (`float`):
            Σ weight · nll ÷ Σ weight over the trained tokens of all samples, plus the weighted auxiliary loss of a
            mixture-of-experts model whose config asks for it.
        token_losses (`tuple[torch.Tensor, ...]`):
            For each sample, the negative log-likelihood of each of its trained tokens, in the order of the tokens:
            `torch.float64` on CPU, of shape `(num_trained_tokens,)`.
        gradients (`dict[str, torch.Tensor]`):
            Gradient of the loss by parameter name, zeros where the loss does not depend on the parameter.
        num_tokens (`int`):
            Number of tokens that the model computed.
        seconds (`float`):
            Wall time of forward and backward.
    """

    loss: float
    token_losses: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor]
    num_tokens: int
    seconds: float


def npass_loss_and_gradients(model: nn.Module, samples: Sequence[Sample]) -> LossAndGradients:
    """
    Loss and gradients of separate samples: one ordinary forward and backward per sample.

    Nothing here knows of trees. The model runs in the mode it is in (put it in `eval()` to turn dropout off) and under
    attention of transformers' own: its current `attn_implementation`, or SDPA (eager where the model has no SDPA) if
    the current one is not stock. `param.grad` is left alone.

    A mixture-of-experts model whose config has `output_router_logits=True` adds its load-balancing loss. That loss is
    not a sum over samples; it is computed as stock `SFTTrainer` does when it puts all samples in one padded batch.

    Args:
        model (`torch.nn.Module`):
            Causal language model of transformers, or a `PeftModel` around one.
        samples (`Sequence[Sample]`):
            Samples, with at least one trained token between them.

    Returns:
        `LossAndGradients`: Loss and gradients over all samples.

    Raises:
        `ValueError`: If no token has a loss weight above 0.
    """
    total_weight = sum(float(sample.loss_weights.sum()) for sample in samples)
    if total_weight <= 0:
        raise ValueError("The loss is a mean over trained tokens, but no token of the samples has a weight above 0.")
    parameters = trainable_parameters(model)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    token_losses, loss = [], 0.0
    with stock_attention(model), stopwatch(model) as seconds:
        for sample in samples:
            nll, weights = _forward(model, sample)
            token_losses.append(nll.detach().double().cpu())
            loss += _accumulate((nll * weights).sum() / total_weight, parameters, gradients)
        if wants_auxiliary_loss(model):
            loss += _accumulate(_auxiliary_loss(model, samples), parameters, gradients)
    num_tokens = sum(map(len, samples))
    return LossAndGradients(loss, tuple(token_losses), gradients, num_tokens, seconds())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training would change (those of the adapter, for LoRA) by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def wants_auxiliary_loss(model: nn.Module) -> bool:
    """Whether the model's config adds a load-balancing loss to the loss."""
    return bool(getattr(text_config(model), "output_router_logits", False))


def text_config(model: Any) -> Any:
    """Config of the language model: its own, or a part of a multimodal one."""
    return model.config.get_text_config()


def gradients_of(loss: torch.Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, zeros where the loss does not depend on the parameter; `param.grad` stays."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter, where inputs go."""
    return next(model.parameters()).device


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """Run the model on attention of transformers' own, and put back what it had."""
    before = text_config(model)._attn_implementation
    stock = before in STOCK_ATTENTION or "/" in before  # a slash names a kernel of the Hub
    if not stock:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        if not stock:
            model.set_attn_implementation(before)


@contextmanager
def stopwatch(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since entry, device work included."""
    device = device_of(model)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    yield lambda: now() - start


def _forward(model: nn.Module, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods and weights of the trained tokens, each of shape `(num_trained_tokens,)`."""
    device = device_of(model)
    trained = torch.from_numpy(np.flatnonzero(sample.loss_weights)).to(device)
    token_ids = torch.tensor(sample.token_ids, device=device)
    logits = model(input_ids=token_ids[None], use_cache=False).logits[0, trained - 1]
    nll = F.cross_entropy(logits.float(), token_ids[trained], reduction="none")
    return nll, torch.tensor(sample.loss_weights, device=device)[trained].to(nll.dtype)


def _auxiliary_loss(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    device = device_of(model)
    token_ids = [torch.tensor(sample.token_ids, device=device) for sample in samples]
    outputs = model(
        input_ids=pad_sequence(token_ids, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(ids) for ids in token_ids], batch_first=True),
        output_router_logits=True,
        use_cache=False,
    )
    weighted: torch.Tensor = text_config(model).router_aux_loss_coef * outputs.aux_loss
    return weighted


def _accumulate(loss: torch.Tensor, parameters: dict[str, nn.Parameter], gradients: dict[str, torch.Tensor]) -> float:
    for name, part in gradients_of(loss, parameters).items():
        gradients[name] += part
    return float(loss.detach())
