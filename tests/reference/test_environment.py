"""Versions and devices that are known to go wrong are named, and no others."""

import pytest

from trl_singlepass.reference.environment import PACKAGES, Environment, Gpu, faster_kernel, known_problems


A100, H100, T4 = (Gpu(name, capability, 2**34) for name, capability in (("A", (8, 0)), ("H", (9, 0)), ("T", (7, 5))))
FLA = {"torch": "2.13.0", "flash-linear-attention": "0.5.1"}


def problems(packages, gpus=(H100,), driver="570.1", cuda="12.8"):
    return list(known_problems(packages, gpus, driver, cuda))


@pytest.mark.parametrize(
    ("triton", "is_wrong"), [("3.3.1", False), ("3.4.0", True), ("3.7.0", True), ("3.7.1", False)]
)
def test_triton_that_miscompiles_the_delta_rule_on_hopper(triton, is_wrong):
    found = problems({**FLA, "triton": triton})
    assert [text for text in found if "Install triton>=3.7.1" in text] == found
    assert len(found) == is_wrong
    assert problems({**FLA, "triton": triton}, gpus=(A100,)) == []
    assert problems({"triton": triton}) == []  # no gated delta rule without fla


@pytest.mark.parametrize(
    ("packages", "gpus", "driver", "cuda", "expected"),
    [
        ({"flash-attn": "2.6.3"}, (A100,), "570.1", "12.8", "Install flash-attn>=2.7"),
        ({"torch": "2.6.0+cu124"}, (A100,), "570.1", "12.4", "Install torch>=2.7"),
        ({"trl": "1.15.0"}, (), None, None, "Install another release"),
        ({"torch": "2.13.0+cpu"}, (), "570.1", None, "Install a CUDA build of PyTorch"),
        ({"torch": "2.13.0"}, (), "570.1", "12.8", "Is CUDA_VISIBLE_DEVICES empty?"),
        ({"torch": "2.13.0"}, (T4,), "570.1", "12.8", "compute capability 8.0"),
    ],
)
def test_a_problem_comes_with_the_way_out(packages, gpus, driver, cuda, expected):
    (found,) = problems(packages, gpus, driver, cuda)
    assert expected in found


def test_what_works_has_no_problems():
    assert problems({"flash-attn": "2.8.3", "trl": "1.16.0", "triton": "3.7.1"}) == []
    assert problems({"torch": "2.13.0+cpu"}, gpus=(), driver=None, cuda=None) == []


@pytest.mark.parametrize(
    ("implementation", "gpus", "installed", "expected"),
    [
        ("sdpa", (H100,), "3.0.0", "load the model with attn_implementation='flash_attention_3'"),
        ("flash_attention_2", (H100, H100), None, "install flash-attn-3 and load the model"),
        ("flash_attention_3", (H100,), "3.0.0", None),
        ("flex_attention", (H100,), "3.0.0", None),  # for a rule that only it knows
        ("sdpa", (A100,), "3.0.0", None),
        ("sdpa", (H100, A100), "3.0.0", None),
        ("sdpa", (), "3.0.0", None),
    ],
)
def test_flash_attention_3_is_recommended_on_hopper(implementation, gpus, installed, expected):
    found = faster_kernel(implementation, gpus, {"flash-attn-3": installed})
    assert found is None if expected is None else found.startswith(expected)


def test_this_machine():
    found = Environment.detect()
    assert found.packages.keys() == set(PACKAGES)
    assert found.packages["torch"] is not None
