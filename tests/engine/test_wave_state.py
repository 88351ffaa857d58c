"""What the waves of a row store for one another, and how much of it."""

import numpy as np
import pytest
import torch

from support.float64_comparison import CHECKPOINTING
from support.lazy_streams import LazyStreams
from support.row_training import assert_waves_equal_npass, batch_of, plan_of, train_in_waves
from support.sample_sets import branchy_chat, reasoning_chat
from support.tiny_models import tiny_model
from support.varlen_reference import ReferenceKernel, switch
from trl_singlepass.attention import blocks, flash, offload, registry
from trl_singlepass.attention.kv_cache import KVCacheView
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.engine.model_call import as_tree
from trl_singlepass.engine.waves import WaveRunner


pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Its new name is not in all releases of transformers that are supported.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


def test_keys_and_values_take_the_bytes_that_are_counted():
    model = tiny_model("qwen3")
    enable_tree(model)
    batch = batch_of([reasoning_chat()])
    for size in (5, 66):
        plan = plan_of(batch, size)
        _, runner = train_in_waves(model, batch, plan)
        config = model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 8
        assert runner.peak_cache_bytes == 2 * plan.cached_tokens * per_token  # with their gradients


def test_layers_with_a_window_keep_what_it_looks_back_to():
    model = tiny_model("gemma3")  # a layer with a window of 7 tokens, and one without
    enable_tree(model)
    batch = batch_of([reasoning_chat(turns=12)])
    plan = plan_of(batch, 100, keep_history=False)
    _, runner = train_in_waves(model, batch, plan)
    (cache,) = runner.caches
    windowed, full = (cache.kv_caches[layer.self_attn, 0].num_slots for layer in model.model.layers)
    assert full == plan.cached_tokens
    assert 6 < windowed < full / 2  # of 14 tokens of history per turn, the six before the next branch


def test_offloaded_keys_and_values_are_on_the_cpu():
    model = tiny_model("qwen3")
    enable_tree(model)
    batch = batch_of([reasoning_chat()])
    tree = as_tree(batch["tree"])
    runner = WaveRunner(plan_of(batch, 20), tree, offload=True)
    for cache in runner.caches:
        stored = cache.get_kv_cache(model, 0, np.arange(3))
        assert stored.zeros_like(torch.zeros(1, 2, 3, 4, device="meta"), torch.float64).device.type == "cpu"


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_offloaded_keys_and_values_are_fetched_once_per_wave_layer_and_pass(family, monkeypatch):
    model = tiny_model(family)
    enable_tree(model)
    batch = batch_of([reasoning_chat(turns=6)])
    rows, fetches = [], []
    row_class, fetch = blocks._Row, KVCacheView.fetch
    monkeypatch.setattr(blocks, "_Row", lambda *args: rows.append(args[-1] is not None) or row_class(*args))
    monkeypatch.setattr(KVCacheView, "fetch", lambda *args: fetches.append(args) or fetch(*args))
    plan = plan_of(batch, 20)
    train_in_waves(model, batch, plan, offload=True)
    forwards_and_backwards = 2 * len(plan.waves) * model.config.num_hidden_layers
    assert 0 < sum(rows) <= len(rows)
    assert len(rows) >= forwards_and_backwards  # and the forwards that store a history
    assert len(fetches) == sum(rows)  # however many branches a wave has


@pytest.fixture
def lazy(monkeypatch):
    """Offloaded caches of a device whose copies run as late as they may; returns its streams."""
    made = []
    monkeypatch.setattr(offload, "Streams", lambda device: made.append(LazyStreams()) or made[-1])
    return made


@pytest.mark.parametrize("checkpointing", ["stored", "non-reentrant"])
@pytest.mark.parametrize("kernel", ["block by block", "varlen"])
def test_copies_beside_the_computation_train_the_same(kernel, checkpointing, lazy, monkeypatch):
    for module in (flash, registry):
        monkeypatch.setattr(module, "flash_kernel", lambda implementation: ReferenceKernel())
    assert_waves_equal_npass(
        tiny_model("gemma3"),
        [reasoning_chat(turns=4), branchy_chat()],
        [25],
        prepare=CHECKPOINTING[checkpointing],
        offload=True,
        switch=switch if kernel == "varlen" else enable_tree,
    )
    assert any(streams.queue for streams in lazy)


def test_keys_and_values_of_the_next_layer_are_fetched_ahead(monkeypatch):
    model = tiny_model("qwen3", num_hidden_layers=4)
    enable_tree(model)
    batch, ahead, fetch = batch_of([reasoning_chat(turns=6)]), [], offload.HostCopies.fetch

    def record(copies, host, *args, kind):
        ahead.append(offload._key(host) in copies._held[kind])
        return fetch(copies, host, *args, kind=kind)

    monkeypatch.setattr(offload.HostCopies, "fetch", record)
    train_in_waves(model, batch, plan_of(batch, 30), offload=True)
    assert sum(ahead) == len(ahead) * 7 / 8  # all but the first of four layers, forward: its backward comes last
