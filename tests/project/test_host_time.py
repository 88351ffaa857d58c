"""A layer on a row dispatches at most a stated multiple of what it does in packed N-pass without trees, by count."""

import json
import shutil
from collections import defaultdict

import pytest

from benchmarks import host_time
from benchmarks.host_time import BUDGETS, RESULTS, WORKLOADS, budget, count_row, per_layer, stock_step
from benchmarks.machine import describe


pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
AGAIN = "run `python -m benchmarks.host_time`"
RECORDED = json.loads(RESULTS.read_text())["versions"]
COUNTED = defaultdict(dict)
for one in json.loads(RESULTS.read_text())["counted"]:
    COUNTED[one["model"]][one["checkpointing"]] = one
# One of each architecture: dense where branches share what is gathered, hybrids again where forks are deep.
QUICK = [
    ("Qwen3-0.6B", "agent, 16 turns"),
    ("gpt-oss-20b", "chat, 16 turns"),
    ("Qwen3.5-4B", "chat, 16 turns"),
    ("Qwen3.5-4B", "agent, 64 turns"),
]
ALL = [
    pytest.param(model, workload, marks=() if (model, workload) in QUICK else pytest.mark.slow)
    for model in BUDGETS
    for workload in WORKLOADS
]


@pytest.mark.parametrize(("model", "workload"), ALL)
def test_counts_are_those_of_this_code_and_within_the_budget(model, workload):
    stored, stock = COUNTED[model][True], per_layer(model, lambda config: stock_step(config, True))
    row = count_row(model, workload)
    assert row["operators"] <= budget(model, workload) * stock["operators"]
    if RECORDED.items() <= describe("cpu")["versions"].items():  # other releases count a few operators more or less
        assert (stored["stock"], stored["row"][workload]) == (stock, row), AGAIN
    for checkpointing in (True, False):
        stored = COUNTED[model][checkpointing]
        assert stored["row"][workload]["operators"] <= budget(model, workload) * stored["stock"]["operators"]


def test_the_page_says_what_the_results_say(tmp_path, monkeypatch):
    page = host_time.PAGE.read_text()
    monkeypatch.setattr(host_time, "PAGE", shutil.copy(host_time.PAGE, tmp_path / "performance.md"))
    monkeypatch.setattr("sys.argv", ["host_time", "--tables"])
    host_time.main()
    assert host_time.PAGE.read_text() == page, AGAIN
