"""The single pass with its losses by turn, for the comparison with N-pass, and a probe for leaks between branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn import functional as F

from ..data.collator import DataCollatorForSinglePass, LoadImages
from ..engine.borrowed_state import captured_embeddings
from ..engine.check.checked_model import effect_of_tokens, get_device, sample_inputs
from ..images.reading import ImageReader
from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree, sample_paths
from ..trees.rows import Row
from ..trees.sample import Sample
from .npass import (
    LossAndGradients,
    compute_gradients,
    get_text_config,
    has_auxiliary_loss,
    stock_attention,
    stopwatch,
    trainable_parameters,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput


@dataclass(frozen=True, slots=True)
class RowImages:
    """How a model reads the images of rows, if it reads any."""

    reader: ImageReader | None = None
    load: LoadImages | None = None  # returns what the model reads of some images


_TEXT = RowImages()


def single_pass_loss_and_gradients(
    model: PreTrainedModel, samples: Sequence[Sample], images: RowImages = _TEXT
) -> LossAndGradients:
    """
    Compute what [`npass_loss_and_gradients`] does in one pass over the samples' tree, on a model under tree attention.

    `num_tokens` counts the tree.
    """
    tree = PrefixTree.from_samples(samples)
    batch = make_batch(tree, get_device(model), images)
    paths = sample_paths(tree, samples)
    positions = (batch["labels"][0] != IGNORE_INDEX).nonzero()[:, 0] - 1
    parameters = trainable_parameters(model)
    with stopwatch(model) as seconds:
        outputs = _forward(model, batch)
        targets = batch["labels"][0, positions + 1]
        nll = F.cross_entropy(outputs.logits[0, positions].float(), targets, reduction="none")
        given = batch["tree"].loss_weights
        weights = nll.new_ones(1) if given is None else given[0, positions + 1].to(nll.dtype)
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
class LeakReport:
    """Which tokens the outputs of a row's turns depend on."""

    # largest gradient of a turn's output with respect to the embedding of a token outside its sample; anything but 0
    # is a leak
    leaked: float
    blind: int  # number of tokens whose embedding has an effect in N-pass but none in the single pass

    @property
    def ok(self) -> bool:
        """Whether each turn sees all tokens of its sample and no others."""
        return self.leaked == 0 and self.blind == 0


def leak_probe(
    model: PreTrainedModel, samples: Sequence[Sample], num_probes: int = 4, images: RowImages = _TEXT
) -> LeakReport:
    """
    Check with gradients that the last outputs of some turns depend on their own history and on no other turn.

    No tolerance is needed: masked attention contributes exactly zero in every precision. Takes a model under tree
    attention, in evaluation mode.
    """
    tree = PrefixTree.from_samples(samples)
    paths = sample_paths(tree, samples)
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(num_probes, len(samples))).round().astype(int))
    leaked, blind = 0.0, 0
    with captured_embeddings(model) as embeddings:
        for index in chosen:
            # One forward per probe: compiled kernels (FlexAttention) free what they saved with the first backward.
            logits = _forward(model, make_batch(tree, get_device(model), images)).logits[0]
            effect = effect_of_tokens(logits[None, paths[index][-1]], embeddings.pop())
            inputs = sample_inputs(model, [samples[index]], images.load)
            with stock_attention(model):
                output = model(**inputs, use_cache=False).logits[0, -1]
            expected = effect_of_tokens(output[None], embeddings.pop())
            own = effect[paths[index]]
            blind += int(((own == 0) & (expected > 1e-3 * expected.max())).sum())
            effect[paths[index]] = 0
            leaked = max(leaked, float(effect.max()))
    return LeakReport(leaked, blind)


def collator_of(images: RowImages) -> DataCollatorForSinglePass:
    """Return the collator of rows, with their images."""
    return DataCollatorForSinglePass(pad_token_id=0, load_images=images.load, image_reader=images.reader)


def make_batch(tree: PrefixTree, device: torch.device, images: RowImages = _TEXT) -> dict[str, Any]:
    """Return the batch of one tree, on a device."""
    batch: dict[str, Any] = send_to_device(collator_of(images)([Row.from_tree(tree).columns()]), device)
    return batch


def _forward(model: PreTrainedModel, batch: dict[str, Any]) -> ModelOutput:
    inputs = {name: value for name, value in batch.items() if name != "labels"} | {"tree": batch["tree"].handled()}
    if has_auxiliary_loss(model):
        inputs["output_router_logits"] = True
    return model(**inputs, use_cache=False)
