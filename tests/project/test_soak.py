"""The soak test finds what does not stay constant."""

import numpy as np
import pytest

from benchmarks import soak


def steps(count=400, **changes):
    """Steps of a run in which all is well, but for what changes: a function of the number of the step."""
    chance = np.random.default_rng(0)
    well = {
        "memory": lambda step: 400 + chance.normal(),
        "threads": lambda step: 7,
        "files": lambda step: 12,
        "seconds": lambda step: 0.1 * (1 + 0.02 * chance.normal()),
        "unit": lambda step: 0.01,
    }
    return [{name: value(step) for name, value in {**well, **changes}.items()} for step in range(count)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"memory": lambda step: 400 + 50 * (step < 60)}, None),  # it settles
        ({"memory": lambda step: 400 + 0.02 * step}, "memory grew by 6.0 MiB"),
        ({"threads": lambda step: 7 + step // 200}, "threads grew from 7 to 8"),
        ({"files": lambda step: 12 + step // 10}, "files grew from 21 to 51"),
        ({"seconds": lambda step: 0.1 + 0.01 * (step > 250)}, "the last steps ran at 0.909"),
        # A machine that others slow down slows the fixed work as well.
        ({name: lambda step: 0.1 + 0.1 * (step > 250) for name in ("seconds", "unit")}, None),
    ],
)
def test_what_does_not_stay_constant_is_named(changes, expected):
    found = soak.complaints({"workers": 0, "rank": 1, **soak.summary(steps(**changes))})
    assert len(found) == (0 if expected is None else 1)
    assert expected is None or expected in found[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("workers", soak.WORKERS)
def test_memory_threads_and_files_stay_constant(workers):
    """In 300 steps only; `python -m benchmarks.soak` runs 2,000, and looks at the speed."""
    for measured in soak.run(workers, 300):
        assert soak.complaints({**measured, "speed": 1.0}) == []
