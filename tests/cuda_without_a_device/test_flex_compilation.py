"""Triton compiles the kernels of FlexAttention for GPUs that are not there, within the shared memory of each."""

import pytest

from support.absent_gpu import CARDS


# Turns and sizes of messages: rows of 751, 101 and 256 tokens, shorter than a block and a multiple of one.
ROW, SHORT, ALIGNED = (4, (20, 100, 38)), (2, (8, 25, 10)), (2, (24, 100, 1))
# Kind and size of the rule, heads, key-value heads, head size, softcap, sinks. Shared memory follows from head sizes;
# rules, caps and sinks change what is computed in it.
CASES = {
    "causal, 64": (*ROW, "causal", 0, 16, 8, 64, None, False),
    "causal, 128": (*ROW, "causal", 0, 16, 8, 128, None, False),
    "causal, 256": (*ROW, "causal", 0, 8, 4, 256, None, False),
    "window and sinks, 64": (*ROW, "window", 32, 64, 8, 64, None, True),
    "chunk, 128": (*ROW, "chunk", 64, 40, 8, 128, None, False),
    "short, 7 query heads per key": (*SHORT, "causal", 0, 28, 4, 64, None, False),
    "aligned, 1 query head per key": (*ALIGNED, "causal", 0, 8, 8, 128, 50.0, False),
    "window and softcap, 256": (*ROW, "window", 128, 8, 4, 256, 50.0, False),
}
KERNELS = {"forward": "flex_attention", "backward": "flex_attention_backward"}


@pytest.fixture(scope="module", params=CARDS)
def compiled(request, lower):
    """A card, and the outcome of every case for it, by direction; both directions are compiled at the same time."""
    started = {
        direction: lower(request.param, direction, list(CASES.values()), compiled=True) for direction in KERNELS
    }
    return CARDS[request.param], {direction: outcomes() for direction, outcomes in started.items()}


@pytest.mark.slow
@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_fit_into_shared_memory(case, direction, compiled):
    card, outcomes = compiled
    outcome = outcomes[direction][CASES[case]]
    assert "compiled" in outcome, outcome
    found = {name: (shared, multiplies) for name, shared, multiplies in outcome["compiled"]}
    assert found.keys() == set(outcome["kernels"])
    (attention,) = [name for name in found if "tem_" in name]
    assert KERNELS[direction] in attention
    assert found[attention][1], "no tensor core multiplies"
    for name, (shared, _) in found.items():
        assert shared <= card.shared_memory_per_block_optin, name
