"""Compare loss and gradients with N-pass in float64, to the tolerance that the project promises."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import row_context
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.reference.verification import ForcedFloat64
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


TOLERANCE = 1e-12


def checkpoint_layers(use_reentrant):
    """Return a function that turns gradient checkpointing on, in float64."""

    def prepare(model):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        recompute_in_float64(model)

    return prepare


CHECKPOINTING = {
    "stored": None,
    "reentrant": checkpoint_layers(use_reentrant=True),
    "non-reentrant": checkpoint_layers(use_reentrant=False),
}


def recompute_in_float64(model):
    """Enter the float64 context in each checkpointed layer: autograd recomputes layers outside of any context."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers
    for layer in layers:
        assert layer.gradient_checkpointing
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = partial(_checkpoint_in_float64, checkpoint)


def _checkpoint_in_float64(checkpoint, function, *args):
    return checkpoint(in_float64(function), *args)


def in_float64(function):
    """Wrap a function so that it runs in the context that forces float64."""

    def forced(*args):
        with ForcedFloat64():
            return function(*args)

    return forced


@contextmanager
def float64_head():
    """Run TRL's fused head in float64 within a block; TRL accumulates in float32."""
    from trl.kernels import ChunkedLogProbFunction  # since TRL 1.16

    class Float64LogProbs(ChunkedLogProbFunction):
        @staticmethod
        def backward(ctx, *gradients):
            with ForcedFloat64():
                return ChunkedLogProbFunction.backward(ctx, *gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Float64LogProbs)
        yield


def one_row_each(sample_sets):
    """Return one row per sample set, with the tree of its samples."""
    return [Row.from_tree(PrefixTree.from_samples(samples)) for samples in sample_sets]


def forward(model, sample_sets, pad_to_multiple_of=None, rows_of=one_row_each, **options):
    """Run the rows of the sample sets joined in one row; return the model's outputs and the batch."""
    rows = [row.columns() for row in rows_of(sample_sets)]
    batch = DataCollatorForSinglePass(pad_token_id=0, pad_to_multiple_of=pad_to_multiple_of)(rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs["output_router_logits"] = True
    with row_context(batch["tree"]):
        return model(**inputs, **options, use_cache=False), batch


def single_pass_loss(model, sample_sets, pad_to_multiple_of=None, rows_of=one_row_each):
    """Return the loss of one row, computed as by any code that shifts labels by one."""
    outputs, batch = forward(model, sample_sets, pad_to_multiple_of, rows_of)
    logits, labels = outputs.logits[0, :-1], batch["labels"][0, 1:]
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    weights = (
        batch["tree"].loss_weights[0, 1:].to(nll.dtype)
        if batch["tree"].loss_weights is not None
        else (labels != -100).to(nll.dtype)
    )
    loss = (nll * weights).sum() / weights.sum()
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        loss = loss + config.router_aux_loss_coef * outputs.aux_loss
    return loss


def assert_equal_to_npass(model, sample_sets, prepare=None, pad_to_multiple_of=None, rows_of=one_row_each):
    """
    Assert that one row gives the loss and the gradient of every parameter of the separate samples.

    `prepare` changes the model after N-pass and before the single pass (to turn gradient checkpointing on); `rows_of`
    turns sample sets into rows.
    """
    expected = npass_loss_and_gradients(model, [sample for samples in sample_sets for sample in samples])
    enable_tree(model)
    if prepare is not None:
        prepare(model)
    model.zero_grad()
    loss = single_pass_loss(model, sample_sets, pad_to_multiple_of, rows_of)
    loss.backward()
    assert_same_loss_and_gradients(float(loss.detach()), gradients_of(model), expected)


def gradients_of(model):
    """Return the accumulated gradient of every trainable parameter by name; zeros where there is none."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}


def pop_gradients(model):
    """Return the accumulated gradients, and begin again."""
    gradients = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    model.zero_grad()
    return gradients


def assert_same_loss_and_gradients(loss, gradients, expected, tolerance=TOLERANCE):
    """Assert that the loss and every gradient equal those of N-pass, each relative to its own size."""
    assert abs(loss - expected.loss) <= tolerance * abs(expected.loss)
    assert_same_gradients(gradients, expected.gradients, tolerance)


def assert_same_gradients(gradients, expected, tolerance=TOLERANCE):
    """Assert that gradients are equal, each relative to its own size."""
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        error = float((gradients[name] - gradient).abs().max())
        # A gradient that is itself only rounding error of the others is compared with their size instead.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert error <= tolerance * scale, f"{name}: gradient is off by {error:.1e}, of {scale:.1e}"
