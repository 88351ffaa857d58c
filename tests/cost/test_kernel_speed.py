"""The bound by kernel against the plain ratio of operations, and numbers of the module's example."""

import pytest

from trl_singlepass.cost import Cost, KernelSpeed, ModelShape, attention_flops


SHAPE = ModelShape(matrix_parameters=0, attention_width=1, head_parameters=0, windows=(None,))


def cost(flops, attention):
    return Cost(tokens=1, attention_pairs=attention // 12, targets=0, flops=flops)


NPASS, SINGLE = cost(120, 48), cost(60, 36)


def test_attention_is_counted_by_its_pairs():
    assert (attention_flops(NPASS, SHAPE), attention_flops(SINGLE, SHAPE)) == (48, 36)


@pytest.mark.parametrize(("attention", "expected"), [(0.8, 1.94), (0.4, 1.70)])
def test_the_example(attention, expected):
    assert KernelSpeed(attention, 0.8).bound(NPASS, SINGLE, SHAPE) == pytest.approx(expected, abs=0.005)


def test_without_recomputation_and_at_one_speed_it_is_the_ratio_of_operations():
    assert KernelSpeed(7 / 6, 1.0).bound(NPASS, SINGLE, SHAPE) == pytest.approx(NPASS.flops / SINGLE.flops)


def test_only_the_ratio_of_the_speeds_matters():
    bounds = [KernelSpeed(0.2 * peak, 0.4 * peak).bound(NPASS, SINGLE, SHAPE) for peak in (1.0, 2.0)]
    assert bounds[0] == pytest.approx(bounds[1])
