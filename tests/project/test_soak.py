"""The soak test finds what does not stay constant."""

import json

import numpy as np
import pytest

from benchmarks import soak


def run(count=400, **changes):
    """A run of four passes in which all is well, but for what changes: a function of the number of the step."""
    chance = np.random.default_rng(0)
    well = {
        "memory": lambda step: 400 + chance.normal(),
        "threads": lambda step: 7,
        "files": lambda step: 12,
        "seconds": lambda step: 0.1 * (1 + 0.5 * np.sin(2 * np.pi * step / 100)),  # rows differ, passes do not
        "unit": lambda step: 0.01,
    }
    columns = {name: [value(step) for step in range(count)] for name, value in {**well, **changes}.items()}
    return {"passes": [0, 100, 200, 300, 390], **columns}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"memory": lambda step: 400 + 50 * (step < 60)}, None),  # it settles
        ({"memory": lambda step: 400 + 0.04 * step}, "memory grew by 12.0 MiB"),
        ({"threads": lambda step: 7 + step // 200}, "threads grew from 7 to 8"),
        ({"files": lambda step: 12 + step // 10}, "files grew from 12 to 42"),
        ({"seconds": lambda step: 0.1 + 0.01 * (step > 250)}, "the last pass ran at 0.909"),
        # A machine that others slow down slows the fixed work as well.
        ({name: lambda step: 0.1 + 0.1 * (step > 250) for name in ("seconds", "unit")}, None),
    ],
)
def test_what_does_not_stay_constant_is_named(changes, expected):
    found = soak.complaints({"workers": 0, "rank": 1, **soak.summary(run(**changes))})
    assert len(found) == (0 if expected is None else 1)
    assert expected is None or expected in found[0]


def test_nothing_grew_in_the_recorded_run():
    measured = json.loads(soak.RESULTS.read_text())["measured"]
    assert [(rank["workers"], rank["rank"]) for rank in measured] == [(w, r) for w in soak.WORKERS for r in (0, 1)]
    assert all(rank["steps"] == soak.STEPS for rank in measured)
    assert [complaint for rank in measured for complaint in soak.complaints(rank)] == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("workers", soak.WORKERS)
def test_memory_threads_and_files_stay_constant(workers):
    """In 600 steps only; `python -m benchmarks.soak` runs 2,000, and looks at the speed."""
    measured = soak.run(workers, 600)
    assert [each for one in measured for each in soak.complaints({**one, "speed": 1.0})] == []
