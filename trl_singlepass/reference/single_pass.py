"""The single pass with its losses by turn, for the comparison with N-pass, and a probe for leaks between branches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn import functional as F

from ..attention import tree_context
from ..data.collator import DataCollatorForSinglePass, LoadImages
from ..images.reading import ImageReader
from ..recurrent.layer_kinds import get_decoder
from ..training.model import without_adapters
from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree, sample_paths
from ..trees.rows import Row
from ..trees.sample import Sample
from .npass import (
    LossAndGradients,
    compute_gradients,
    get_device,
    get_text_config,
    has_auxiliary_loss,
    sample_inputs,
    stock_attention,
    stopwatch,
    trainable_parameters,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput


def single_pass_loss_and_gradients(
    model: PreTrainedModel, samples: Sequence[Sample], images: RowImages | None = None
) -> LossAndGradients:
    """
    Compute loss and gradients of the same samples in one pass over their prefix tree.

    Args:
        model (`torch.nn.Module`):
            Model under tree attention (see [`enable_tree`]), in training or evaluation mode.
        samples (`Sequence[Sample]`):
            Samples, with at least one trained token in all.
        images (`RowImages`, *optional*):
            How the model reads images, if the samples show any.

    Returns:
        `LossAndGradients`: The same quantities as from [`npass_loss_and_gradients`]; `num_tokens` counts the tree.
    """
    tree = PrefixTree.from_samples(samples)
    batch = _make_batch(tree, get_device(model), images)
    paths = sample_paths(tree, samples)
    positions = (batch["labels"][0] != IGNORE_INDEX).nonzero()[:, 0] - 1
    parameters = trainable_parameters(model)
    with stopwatch(model) as seconds:
        outputs = _forward(model, batch, images)
        targets = batch["labels"][0, positions + 1]
        nll = F.cross_entropy(outputs.logits[0, positions].float(), targets, reduction="none")
        weights = batch["loss_weights"][0, positions + 1].to(nll.dtype) if "loss_weights" in batch else nll.new_ones(1)
        loss = (nll * weights).sum() / weights.expand_as(nll).sum()
        if has_auxiliary_loss(model):
            loss = loss + get_text_config(model).router_aux_loss_coef * outputs.aux_loss
        gradients = compute_gradients(loss, parameters)
    row_nll = torch.full((len(tree),), torch.nan, dtype=torch.float64)
    row_nll[positions.cpu()] = nll.detach().double().cpu()
    token_losses = tuple(
        row_nll[path[np.flatnonzero(sample.loss_weights) - 1]] for sample, path in zip(samples, paths, strict=True)
    )
    return LossAndGradients(float(loss.detach()), token_losses, gradients, len(tree), seconds())


@dataclass(frozen=True, slots=True)
class RowImages:
    """
    How a model reads the images of rows.

    Args:
        reader (`ImageReader`):
            Reader of the model.
        load (`Callable`):
            Returns what the model reads of some images.
    """

    reader: ImageReader
    load: LoadImages


@dataclass(frozen=True, slots=True)
class LeakReport:
    """
    Which tokens the outputs of a row's turns depend on.

    Args:
        leaked (`float`):
            Largest gradient of a turn's output with respect to the embedding of a token outside its sample. Anything
            but 0 is a leak.
        blind (`int`):
            Number of tokens whose embedding has an effect in N-pass but none in the single pass.
    """

    leaked: float
    blind: int

    @property
    def ok(self) -> bool:
        """Whether each turn sees all tokens of its sample and no others."""
        return self.leaked == 0 and self.blind == 0


def leak_probe(
    model: PreTrainedModel, samples: Sequence[Sample], num_probes: int = 4, images: RowImages | None = None
) -> LeakReport:
    """
    Check with gradients that each turn sees its own history and nothing of the other turns.

    No tolerance is needed: masked attention contributes exactly zero in every precision.

    Args:
        model (`torch.nn.Module`):
            Model under tree attention, in evaluation mode.
        samples (`Sequence[Sample]`):
            Samples of one row.
        num_probes (`int`, defaults to 4):
            Number of samples, evenly spread, whose last output is differentiated.
        images (`RowImages`, *optional*):
            How the model reads images, if the samples show any.

    Returns:
        `LeakReport`: Leaks and blind spots over all probes.
    """
    tree = PrefixTree.from_samples(samples)
    paths = sample_paths(tree, samples)
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(num_probes, len(samples))).round().astype(int))
    leaked, blind = 0.0, 0
    with _captured_embeddings(model) as embeddings:
        for index in chosen:
            # One forward per probe: compiled kernels (FlexAttention) free what they saved with the first backward.
            logits = _forward(model, _make_batch(tree, get_device(model), images), images).logits[0]
            effect = _effect(logits[paths[index][-1]], embeddings.pop())
            inputs = sample_inputs(model, [samples[index]], None if images is None else images.load)
            with stock_attention(model):
                output = model(**inputs, use_cache=False).logits[0, -1]
            expected = _effect(output, embeddings.pop())
            own = effect[paths[index]]
            blind += int(((own == 0) & (expected > 1e-3 * expected.max())).sum())
            effect[paths[index]] = 0
            leaked = max(leaked, float(effect.max()))
    return LeakReport(leaked, blind)


def _effect(output: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Largest absolute gradient of an output by token, of shape `(length,)`; embeddings are `(1, length, hidden)`."""
    direction = torch.cos(torch.arange(len(output), device=output.device)).to(output.dtype)
    (gradient,) = torch.autograd.grad(output @ direction, embeddings)
    return gradient[0].abs().amax(-1).double().cpu()


@contextmanager
def _captured_embeddings(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """
    Collect what the language model reads of each token as leaves, so that they have gradients even if it is frozen.

    That is the output of the embedding layer, or, where a model puts features of images into it, what comes of that.
    """
    captured: list[torch.Tensor] = []

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if kwargs.get("inputs_embeds") is None:
            return None
        captured[-1] = kwargs["inputs_embeds"].detach().requires_grad_()
        return args, {**kwargs, "inputs_embeds": captured[-1]}

    decoder = get_decoder(without_adapters(model))
    handles = [
        model.get_input_embeddings().register_forward_hook(hook),
        decoder.register_forward_pre_hook(pre_hook, with_kwargs=True),
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _make_batch(tree: PrefixTree, device: torch.device, images: RowImages | None = None) -> dict[str, Any]:
    collate = DataCollatorForSinglePass(pad_token_id=0)
    if images is not None:
        collate.load_images, collate.positions = images.load, images.reader.positions
    batch: dict[str, Any] = send_to_device(collate([Row.from_tree(tree).columns()]), device)
    return batch


def _forward(model: PreTrainedModel, batch: dict[str, Any], images: RowImages | None = None) -> ModelOutput:
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    if has_auxiliary_loss(model):
        inputs["output_router_logits"] = True
    shown: AbstractContextManager[None] = nullcontext()
    if images is not None:
        inputs |= images.reader.model_inputs(batch)
        shown = images.reader.showing(batch)
    with shown, tree_context(batch["tree_plan"], batch["subtree_end"], batch["position_ids"]):
        return model(**inputs, use_cache=False)
