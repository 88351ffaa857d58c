"""Train a row that ranks share, on threads and without a trainer, and compare it with N-pass."""

import copy

import torch

from support.float64_comparison import assert_same_loss_and_gradients, gradients_of, in_float64
from support.thread_ranks import on_ranks
from support.wave_training import batch_of, plan_of, targets_and_weights
from trl_singlepass.attention.context import running_on
from trl_singlepass.data.collator import pad_batch
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.engine.ulysses import register_shared_attention
from trl_singlepass.engine.waves import WaveRunner, select
from trl_singlepass.reference import npass_loss_and_gradients


def share_rows(model):
    """Enable trees in a model, on rows that ranks share."""
    enable_tree(model)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(register_shared_attention(model.config.get_text_config()._attn_implementation))


def assert_shared_rows_equal_npass(model, sample_sets, size, wave_tokens=None, prepare=None):
    """Assert that a row that `size` ranks share gives the loss and all gradients of the separate samples."""
    copies = [copy.deepcopy(model) for _ in range(size)]
    expected = npass_loss_and_gradients(model, [sample for samples in sample_sets for sample in samples])

    def train(group):
        own = copies[group.rank]
        share_rows(own)
        if prepare is not None:
            prepare(own)
        return in_float64(train_part)(own.train(), batch_of(sample_sets), group, wave_tokens), gradients_of(own)

    results = on_ranks(size, train)
    loss = sum(loss for loss, _ in results)
    gradients = {name: sum(gradients[name] for _, gradients in results) for name in results[0][1]}
    assert_same_loss_and_gradients(loss, gradients, expected)


def train_part(model, batch, group, wave_tokens=None):
    """Accumulate one rank's gradients of a row; return its part of the loss."""
    batch = {name: value for name, value in batch.items() if name != "subtree_end"}
    batch = pad_batch(batch, group.padded_length(batch["tree"].plan.length), 0)
    tree = as_tree(batch["tree"], group)
    labels, weights = targets_and_weights(batch)

    def forward(wave, tokens):
        inputs = {name: select(batch[name], tokens) for name in ("input_ids", "position_ids", "attention_mask")}
        return model(**{name: group.pad_and_part(x) for name, x in inputs.items()}, use_cache=False).logits

    def part_of_loss(logits, tokens):
        targets = group.pad_and_part(select(labels, tokens), fill=-100)[0]
        nll = torch.nn.functional.cross_entropy(logits[0], targets, reduction="none", ignore_index=-100)
        return (nll * group.pad_and_part(select(weights, tokens))[0]).sum() / weights.sum()

    if wave_tokens is None:
        row = ((0, batch["tree"].plan.length),)
        with running_on(tree):
            loss = part_of_loss(forward(None, row), row)
        loss.backward()
        return float(loss.detach())
    total = 0.0
    for wave, logits in WaveRunner(plan_of(batch, wave_tokens), tree).train(forward, forward):
        loss = part_of_loss(logits, ((wave.start, wave.end),))
        loss.backward()
        total += float(loss.detach())
    return total
