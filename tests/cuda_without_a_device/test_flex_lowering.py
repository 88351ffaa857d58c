"""Inductor lowers tree attention by FlexAttention to Triton kernels for an H100, on a machine without one."""

import itertools

import pytest


# Turns and sizes of messages.
SHORT, ALIGNED, LONG = (2, (8, 25, 10)), (2, (24, 100, 1)), (4, (20, 100, 38))
LENGTHS = {SHORT: 101, ALIGNED: 256, LONG: 751}
# Kind and size of the rule, softcap, sinks.
RULES = {
    "causal": ("causal", 0, None, False),
    "window": ("window", 128, None, False),
    "chunk": ("chunk", 64, None, False),
    "softcap": ("causal", 0, 50.0, False),
    "sinks": ("window", 32, None, True),
}
HEAD_DIMS = [64, 128, 256]
# Query heads, key-value heads: 1, 2, 4 and 7 query heads for each.
HEADS = [(8, 8), (16, 8), (32, 8), (28, 4)]


def case_of(row, rule, head_dim, heads):
    """As `support.flex_lowering_worker` takes it."""
    kind, size, softcap, sinks = RULES[rule]
    return (*row, kind, size, *heads, head_dim, softcap, sinks)


# Every rule with every size and number of heads; the lengths of rows take turns.
MATRIX = [
    (list(LENGTHS)[sum(place) % len(LENGTHS)], list(RULES)[place[0]], HEAD_DIMS[place[1]], HEADS[place[2]])
    for place in itertools.product(*(range(len(values)) for values in (RULES, HEAD_DIMS, HEADS)))
]
KERNELS = {"forward": "flex_attention", "backward": "flex_attention_backward"}


@pytest.fixture(scope="module")
def matrix(lower):
    """Outcome of every case, by direction; both directions are lowered at the same time."""
    cases = [case_of(*case) for case in MATRIX]
    started = {direction: lower("H100", direction, cases) for direction in KERNELS}
    return {direction: outcomes() for direction, outcomes in started.items()}


def check(outcome, row, direction):
    assert outcome["length"] == LENGTHS[row]
    kernels = outcome.get("kernels", ())
    assert any(KERNELS[direction] in kernel and "tem_" in kernel for kernel in kernels), outcome


@pytest.mark.slow
@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize(("row", "rule", "head_dim", "heads"), MATRIX)
def test_tree_attention_lowers_to_the_main_kernels(row, rule, head_dim, heads, direction, matrix):
    check(matrix[direction][case_of(row, rule, head_dim, heads)], row, direction)
