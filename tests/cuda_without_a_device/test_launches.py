"""Kernel launches and copies of tree attention, per layer and step, counted on meta tensors in the place of a GPU."""

import pytest
import torch

from support.gpu_stand_in import H100
from support.launch_count import LaunchAndCopyCounter, launches_of_a_step
from support.tree_masks import chat, mask_of
from trl_singlepass.attention.block_mask import build_block_mask
from trl_singlepass.attention.interface import AttentionInputs
from trl_singlepass.attention.kernel_choice import DeviceTraits
from trl_singlepass.attention.sdpa import torch_tree_attention
from trl_singlepass.attention.varlen_plan import varlen_plan
from trl_singlepass.engine.wave_plan import WavePlan
from trl_singlepass.engine.waves import GroupCache, WaveTree


MOST_LAUNCHES = 60
"""Of a layer in a step: forward, recomputation and backward."""
AS_STATED = {  # in `docs/performance.md`, without sinks and with them
    "few branches": (18, 33),
    "many branches": (40, 57),
    "many branches, long window": (41, 56),
    "wave": (47, 56),
    "wave, window": (26, 41),
    "wave, long history": (48, 57),
}


@pytest.fixture
def _h100(monkeypatch):
    """Meta tensors are taken for tensors of an H100."""
    monkeypatch.setattr(DeviceTraits, "from_device", classmethod(lambda cls, device: H100))


def inputs_of(tree, dtype=torch.bfloat16, sinks=False):
    """Inputs in the memory order in which layers make them: tokens before heads."""
    options = {"dtype": dtype, "device": "meta", "requires_grad": True}
    query, key, value = (
        torch.empty(1, tree.plan.length, heads, 64, **options).transpose(1, 2).detach().requires_grad_()
        for heads in (16, 8, 8)
    )
    return AttentionInputs(query, key, value, 0.125, sinks=torch.empty(16, **options) if sinks else None)


ROWS = [
    ("few branches", 2, "causal", 0),
    ("few branches", 16, "causal", 0),
    ("few branches", 16, "window", 512),
    ("few branches", 64, "window", 512),
    ("few branches", 64, "chunk", 1024),
    ("many branches", 64, "causal", 0),
    ("many branches", 64, "chunk", 65_536),
    ("many branches", 400, "causal", 0),
    ("many branches, long window", 64, "window", 4096),
]


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("shape", "turns", "kind", "size"), ROWS)
def test_launches_of_sdpa_in_half_precision(shape, turns, kind, size, sinks):
    mask = mask_of(chat(turns), kind, size)
    inputs = inputs_of(mask.tree, sinks=sinks)
    mask.build_once(varlen_plan, 2, None)
    launches = launches_of_a_step(lambda: torch_tree_attention(inputs, mask))
    assert launches == AS_STATED[shape][sinks] <= MOST_LAUNCHES


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize(("kind", "size", "stated"), [("causal", 0, 9_200), ("window", 512, 8_900)])
def test_launches_of_the_block_path_are_as_stated(kind, size, stated):
    """Float32, which no flash kernel takes: `docs/performance.md` says what that costs."""
    mask = mask_of(chat(16), kind, size)
    launches = launches_of_a_step(lambda: torch_tree_attention(inputs_of(mask.tree, torch.float32), mask))
    assert 0.9 * stated <= launches <= stated


WAVES = [
    ("wave", 16, 6_000, "causal", 0),
    ("wave, window", 16, 6_000, "window", 512),
    ("wave, window", 64, 6_000, "chunk", 1024),
    ("wave, long history", 64, 2_000, "causal", 0),
]


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("shape", "turns", "wave_tokens", "kind", "size"), WAVES)
def test_launches_of_waves_in_half_precision(shape, turns, wave_tokens, kind, size, sinks):
    """Waves whose ancestors ran before, and which later waves attend to."""
    tree, layer = chat(turns), torch.nn.Identity()
    (group,) = WavePlan.from_tree_plan(tree.plan, wave_tokens, keep_history=False).groups
    cache, most = GroupCache(tree.plan, group), 0

    def attend(wave, tokens, stores):
        wave_tree = WaveTree.from_wave(wave, tokens, cache, tree, stores=stores)
        mask, inputs = mask_of(wave_tree, kind, size), inputs_of(wave_tree, sinks=sinks)
        view = wave_tree.kv_cache(layer, mask.local_size)
        mask.build_once(varlen_plan, 2, view.slots)
        return lambda: torch_tree_attention(inputs, mask, view)

    for wave in filter(lambda wave: wave.handed_on, group):
        with torch.no_grad():
            attend(wave, wave.handed_on, stores=True)()
    for wave in reversed(group):
        most = max(most, launches_of_a_step(attend(wave, ((wave.start, wave.end),), stores=False)))
    assert most == AS_STATED[shape][sinks] <= MOST_LAUNCHES


@pytest.mark.parametrize(("build", "most"), [(varlen_plan, 1), (lambda mask: build_block_mask(mask, (128, 128)), 2)])
@pytest.mark.parametrize(("kind", "size"), [("causal", 0), ("window", 512)])
def test_copies_to_the_device_per_mask_type_and_row(kind, size, build, most):
    """Operators that wait for a device (`item`, `nonzero`, masks as indices) fail on meta tensors by themselves."""
    mask = mask_of(chat(64), kind, size)
    with LaunchAndCopyCounter() as count:
        build(mask)
    assert count.copies_to_device <= most
