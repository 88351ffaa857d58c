"""A row run wave by wave, without a trainer: what the wave tests share."""

import torch

from support.exact import TOLERANCE
from trl_singlepass.attention.context import Tree
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.training.model import enable_tree
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row
from trl_singlepass.waves import WavePlan, WaveRunner, select


def batch_of(sample_sets, pad_to_multiple_of=None):
    rows = [Row.from_tree(PrefixTree.from_samples(samples)).columns() for samples in sample_sets]
    return DataCollatorForSinglePass(pad_token_id=0, pad_to_multiple_of=pad_to_multiple_of)(rows)


def plan_of(batch, wave_tokens, **kwargs):
    return WavePlan.from_tree_plan(batch["tree_plan"], wave_tokens, **kwargs)


def targets_and_weights(batch):
    """Target of each position and its loss weight."""
    labels = torch.cat([batch["labels"][:, 1:], torch.full((1, 1), -100)], dim=1)
    weights = batch.get("loss_weights", (batch["labels"] != -100).double())
    return labels, torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1).double()


def train_in_waves(model, batch, plan, offload=False):
    """Accumulate the gradients of a row; return its loss and the row."""
    row = WaveRunner(plan, Tree(batch["tree_plan"], batch["subtree_end"], batch["position_ids"]), offload)
    labels, weights = targets_and_weights(batch)

    def forward(wave, tokens):
        inputs = {name: select(batch[name], tokens) for name in ("input_ids", "position_ids", "attention_mask")}
        return model(**inputs, use_cache=False).logits

    total = 0.0
    for wave, logits in row.train(forward, forward):
        tokens = ((wave.start, wave.end),)
        nll = torch.nn.functional.cross_entropy(
            logits[0], select(labels, tokens)[0], reduction="none", ignore_index=-100
        )
        loss = (nll * select(weights, tokens)[0]).sum() / weights.sum()
        loss.backward()
        total += float(loss.detach())
    return total, row


def assert_waves_equal_npass(
    model, sample_sets, wave_tokens, prepare=None, pad_to_multiple_of=None, offload=False, **plan_settings
):
    """Assert that loss and all gradients of a row that runs in waves are those of the separate samples."""
    expected = npass_loss_and_gradients(model, [sample for samples in sample_sets for sample in samples])
    enable_tree(model)
    if prepare is not None:
        prepare(model)
    batch = batch_of(sample_sets, pad_to_multiple_of)
    for tokens in wave_tokens:
        model.zero_grad()
        loss, _ = train_in_waves(model, batch, plan_of(batch, tokens, **plan_settings), offload)
        assert abs(loss - expected.loss) <= TOLERANCE * abs(expected.loss)
        assert_gradients_equal(model, expected.gradients)


def assert_gradients_equal(model, expected):
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = float((gradient - expected[name]).abs().max())
        scale = max(float(expected[name].abs().max()), 1e-3 * largest)
        assert error <= TOLERANCE * scale, f"{name}: gradient is off by {error:.1e}, of {scale:.1e}"
