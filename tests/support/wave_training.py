"""Train a row wave by wave without a trainer, and compare it with N-pass."""

import torch

from support.float64_comparison import assert_same_loss_and_gradients, gradients_of
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.engine.wave_plan import WavePlan
from trl_singlepass.engine.waves import WaveRunner, select
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


def batch_of(sample_sets, pad_to_multiple_of=None):
    rows = [Row.from_tree(PrefixTree.from_samples(samples)).columns() for samples in sample_sets]
    return DataCollatorForSinglePass(pad_token_id=0, pad_to_multiple_of=pad_to_multiple_of)(rows)


def plan_of(batch, wave_tokens, **kwargs):
    return WavePlan.from_tree_plan(batch["tree"].plan, wave_tokens, **kwargs)


def targets_and_weights(batch):
    """Return the target of each position and its loss weight, both `(1, num_tokens)`."""
    labels = torch.cat([batch["labels"][:, 1:], torch.full((1, 1), -100)], dim=1)
    given = batch["tree"].loss_weights
    weights = (batch["labels"] != -100).double() if given is None else given
    return labels, torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1).double()


def train_in_waves(model, batch, plan, offload=False):
    """Accumulate the gradients of a row; return its loss and the row."""
    row = WaveRunner(plan, as_tree(batch["tree"]), offload)
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
    model, sample_sets, wave_tokens, prepare=None, pad_to_multiple_of=None, offload=False, switch=enable_tree, **kwargs
):
    """Assert that a row in waves gives the loss and all gradients of the separate samples, for each `wave_tokens`."""
    expected = npass_loss_and_gradients(model, [sample for samples in sample_sets for sample in samples])
    switch(model)
    if prepare is not None:
        prepare(model)
    batch = batch_of(sample_sets, pad_to_multiple_of)
    for tokens in wave_tokens:
        model.zero_grad()
        loss, _ = train_in_waves(model, batch, plan_of(batch, tokens, **kwargs), offload)
        assert_same_loss_and_gradients(loss, gradients_of(model), expected)
