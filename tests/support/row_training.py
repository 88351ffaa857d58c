"""Train a row at once, wave by wave or on ranks that share it, without a trainer, and compare it with N-pass."""

import copy

import torch

from support.float64_comparison import (
    assert_same_loss_and_gradients,
    gradients_of,
    in_float64,
    one_row_each,
)
from support.thread_ranks import on_ranks
from trl_singlepass.attention.context import running_on
from trl_singlepass.data.collator import DataCollatorForSinglePass, pad_batch
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.engine.ulysses import register_shared_attention
from trl_singlepass.engine.wave_plan import WavePlan
from trl_singlepass.engine.waves import WaveRunner, select
from trl_singlepass.reference import npass_loss_and_gradients


def batch_of(sample_sets, pad_to_multiple_of=None):
    rows = [row.columns() for row in one_row_each(sample_sets)]
    return DataCollatorForSinglePass(pad_token_id=0, pad_to_multiple_of=pad_to_multiple_of)(rows)


def plan_of(batch, wave_tokens, **kwargs):
    return WavePlan.from_tree_plan(batch["tree"].plan, wave_tokens, **kwargs)


def targets_and_weights(batch):
    """Return the target of each position and its loss weight, both `(1, num_tokens)`."""
    labels = torch.cat([batch["labels"][:, 1:], torch.full((1, 1), -100)], dim=1)
    given = batch["tree"].loss_weights
    weights = (batch["labels"] != -100).double() if given is None else given
    return labels, torch.cat([weights[:, 1:], torch.zeros_like(weights[:, :1])], dim=1).double()


def train_in_waves(model, batch, plan, offload=False, group=None):
    """Accumulate a rank's gradients of a row; return its part of the loss, and what ran the waves."""
    labels, weights = targets_and_weights(batch)
    part = (lambda x, fill=0: x) if group is None else group.pad_and_part

    def forward(wave, tokens):
        inputs = {name: part(select(batch[name], tokens)) for name in ("input_ids", "position_ids", "attention_mask")}
        return model(**inputs, use_cache=False).logits

    def backward(logits, tokens):
        targets = part(select(labels, tokens), fill=-100)[0]
        nll = torch.nn.functional.cross_entropy(logits[0], targets, reduction="none", ignore_index=-100)
        loss = (nll * part(select(weights, tokens))[0]).sum() / weights.sum()
        loss.backward()
        return float(loss.detach())

    tree = as_tree(batch["tree"], group)
    if plan is None:
        row = ((0, batch["tree"].plan.length),)
        with running_on(tree):
            return backward(forward(None, row), row), None
    runner = WaveRunner(plan, tree, offload)
    return sum(backward(x, ((wave.start, wave.end),)) for wave, x in runner.train(forward, forward)), runner


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


def share_rows(model):
    """Enable trees in a model, on rows that ranks share."""
    enable_tree(model)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(register_shared_attention(model.config.get_text_config()._attn_implementation))


def train_part(model, sample_sets, group, wave_tokens=None):
    """Accumulate one rank's gradients of a row that ranks share; return its part of the loss."""
    batch = batch_of(sample_sets)
    batch = pad_batch(batch, group.padded_length(batch["tree"].plan.length), 0)
    plan = None if wave_tokens is None else plan_of(batch, wave_tokens)
    return train_in_waves(model, batch, plan, group=group)[0]


def assert_shared_rows_equal_npass(model, sample_sets, size, wave_tokens=None, prepare=None):
    """Assert that a row that `size` ranks share gives the loss and all gradients of the separate samples."""
    copies = [copy.deepcopy(model) for _ in range(size)]
    expected = npass_loss_and_gradients(model, [sample for samples in sample_sets for sample in samples])

    def train(group):
        own = copies[group.rank]
        share_rows(own)
        if prepare is not None:
            prepare(own)
        return in_float64(train_part)(own.train(), sample_sets, group, wave_tokens), gradients_of(own)

    results = on_ranks(size, train)
    loss = sum(loss for loss, _ in results)
    gradients = {name: sum(gradients[name] for _, gradients in results) for name in results[0][1]}
    assert_same_loss_and_gradients(loss, gradients, expected)
