"""A layer that `kernelize` replaces by a kernel of the Hub is exact on trees, or refused by the check."""

import pytest
import torch

from support.float64_comparison import assert_equal_to_npass
from support.hub_kernels import hub_kernels
from support.sample_sets import reasoning_chat
from support.tiny_models import tiny_model
from support.tree_checks import checked
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.recurrent.measurement import path_dependent_layers


pytestmark = pytest.mark.usefixtures("float64")
CALLS = []


def norm(self, hidden_states):
    CALLS.append("norm")
    return self.weight * hidden_states * (hidden_states.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()


def norm_of_the_row(self, hidden_states):
    return self.weight * hidden_states * (hidden_states.pow(2).mean((-1, -2), keepdim=True) + 1e-5).rsqrt()


def rotated(self, q, k, cos, sin, unsqueeze_dim=1):
    CALLS.append("rotary")
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return tuple(x * cos + torch.cat(x.chunk(2, -1)[::-1], -1) * sin * signs(x) for x in (q, k))


def signs(x):
    return torch.ones(x.shape[-1], dtype=x.dtype).index_fill(0, torch.arange(x.shape[-1] // 2), -1)


def rotated_by_the_place_in_the_row(self, q, k, cos, sin, unsqueeze_dim=1):
    places = torch.arange(q.shape[2], dtype=q.dtype)[:, None]
    return q * places.cos(), k * places.cos()


@pytest.mark.parametrize("order", ["loaded with kernels", "kernels after trees"])
def test_kernels_that_compute_what_layers_compute_are_exact(order):
    model = tiny_model("qwen3")
    CALLS.clear()
    if order == "kernels after trees":
        enable_tree(model)
    with hub_kernels(model, RMSNorm=norm, rotary_pos_emb=rotated):
        assert_equal_to_npass(model, [reasoning_chat()])
        model.eval().train()  # puts kernels in place again
        model.zero_grad()
        assert checked(model).ok
    assert {"norm", "rotary"} <= set(CALLS)


def test_a_kernel_that_looks_at_the_row_is_refused():
    with hub_kernels(tiny_model("qwen3"), RMSNorm=norm_of_the_row) as model:
        assert not checked(model).ok


def test_attention_that_rotates_by_the_place_in_the_row_runs_over_whole_paths():
    with hub_kernels(tiny_model("qwen3"), rotary_pos_emb=rotated_by_the_place_in_the_row) as model:
        assert checked(model).ok
        assert {mode.attends for mode in path_dependent_layers(model).values()} == {True}
