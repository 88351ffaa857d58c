"""
What a training step makes the host and a GPU wait for, on meta tensors in the place of one.

Operators whose result the host needs (`item`, `tolist`, `nonzero`, masks as indices) fail on meta tensors, so that a
step which ends has none. Copies to the device are counted.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_counts import on_meta_tensors
from benchmarks.model_shapes import get_config, make_model
from support.launch_count import LaunchAndCopyCounter
from support.tree_masks import chat
from trl_singlepass.attention.context import running_on
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.row_runner import Factors
from trl_singlepass.engine.wave_plan import WavePlan
from trl_singlepass.engine.waves import WaveRunner
from trl_singlepass.training.loss import total_weight
from trl_singlepass.training.metrics import PooledLoss, TokenCounts, TurnMetrics


pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
MASK_TYPES = {"Qwen3-0.6B": 1, "gpt-oss-20b": 2, "Qwen3.5-4B": 2}
"""Types of layers that read the tree in different ways: full, windows, recurrent."""
COPIES_PER_TYPE = 2


def decode(model, num_tokens):
    integers = torch.empty(1, num_tokens, dtype=torch.long, device="meta")
    return model.model(integers, position_ids=integers, attention_mask=integers, use_cache=False)[0]


@pytest.fixture(params=MASK_TYPES)
def model(request):
    with on_meta_tensors():
        name = request.param
        model = make_model(get_config(name, 4), "torch_varlen", "meta")
        enable_tree(model)
        model.most_copies = COPIES_PER_TYPE * MASK_TYPES[name]
        yield model


def test_a_row_is_copied_once_per_type_of_layer(model):
    tree = chat(16)
    with LaunchAndCopyCounter() as count, running_on(tree):
        decode(model, tree.plan.length).sum().backward()
    assert 0 < count.copies_to_device <= model.most_copies


def test_each_wave_is_copied_once_per_type_of_layer(model):
    tree = chat(16)
    plan = WavePlan.from_tree_plan(tree.plan, 6_000, keep_history=False)
    runs = len(plan.waves) + sum(bool(wave.handed_on) for wave in plan.waves)

    def forward(wave, tokens):
        return decode(model, sum(last - first for first, last in tokens))

    with LaunchAndCopyCounter() as count:
        for _, hidden in WaveRunner(plan, tree).train(forward, forward):
            hidden.sum().backward()
    assert 0 < count.copies_to_device <= model.most_copies * runs


def test_metrics_stay_on_the_device():
    device, length = torch.device("meta"), 9
    loss, weights = torch.empty((), device=device), torch.empty(1, length, device=device)
    parts = torch.empty(1, length, dtype=torch.long, device=device)
    outputs = SimpleNamespace(log_probs=weights[:, 1:], is_top1=weights[:, 1:], label_mask=weights[:, 1:])
    batch = {"tree_plan": replace(chat(2).plan, example_ends=(length,)), "loss_weights": weights, "labels": parts}
    pooled, counts, turns = PooledLoss(device), TokenCounts(), TurnMetrics(device)
    with LaunchAndCopyCounter() as count:
        pooled.add(loss, total_weight(batch))
        counts.add([batch], total_weight(batch))
        turns.add(outputs, parts, weights)
    assert count.launches > 0
    assert count.copies_to_device == 0


@pytest.mark.parametrize("is_dft", [False, True])
def test_the_loss_of_a_wave_stays_on_the_device(is_dft):
    weights = torch.empty(1, 9, device="meta")
    outputs = SimpleNamespace(log_probs=weights[:, 2:7].clone().requires_grad_(), aux_loss=None)
    with LaunchAndCopyCounter() as count:
        Factors(weights, is_dft=is_dft)(outputs, start=2).backward()
    assert count.launches > 0
    assert count.copies_to_device == 0
