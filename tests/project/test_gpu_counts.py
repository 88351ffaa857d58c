"""docs/performance.md says what is counted, and the counts are those of this code."""

import json
import shutil

import pytest

from benchmarks import gpu_counts
from benchmarks.gpu_counts import RESULTS, WORKLOADS, count_step, launches, operations
from benchmarks.kernel_speed import KernelSpeed
from benchmarks.model_shapes import MODELS, get_config
from support.slow import slow_but_for
from trl_singlepass.cost import Cost, ModelShape
from trl_singlepass.reference.timing import Schedule, Sizes, conversation


pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
AGAIN = "run `python -m benchmarks.gpu_counts`"
COUNTED = {(one["model"], one["workload"]): one for one in json.loads(RESULTS.read_text())["counted"]}
SHORT = conversation(2, 1000, 0, Sizes(user=(5, 10), reasoning=(20, 40), answer=(5, 10)))


def test_every_model_and_workload_is_counted():
    assert COUNTED.keys() == {(model, workload) for model in MODELS for workload in WORKLOADS}


@pytest.mark.parametrize("model", MODELS)
def test_operations_are_those_of_this_code(model):
    for workload in list(WORKLOADS)[:3]:
        stored = COUNTED[model, workload]
        assert operations(model, workload).items() <= stored.items(), AGAIN


@pytest.mark.parametrize(
    "model",  # one of each architecture
    slow_but_for(["Qwen3-0.6B"], ["Qwen3-0.6B", "gpt-oss-20b", "Qwen3.5-4B"]),
)
def test_launches_are_those_of_this_code(model):
    assert launches(model, "chat, 16 turns") == COUNTED[model, "chat, 16 turns"]["launches"], AGAIN


@pytest.mark.parametrize("model", slow_but_for(["Qwen3-0.6B"], ["Qwen3-0.6B", "gpt-oss-20b", "Qwen3.5-4B"]))
def test_launches_grow_by_the_same_number_with_every_period_of_layers(model):
    period = MODELS[model][2]
    counts = [count_step(get_config(model, period * n), SHORT, Schedule.SINGLE_PASS) for n in (1, 2, 3)]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_a_slower_attention_lowers_the_bound():
    for one in COUNTED.values():
        assert one["bounds"]["Triton"] <= one["bounds"]["FA2"] <= one["bounds"]["FA3"] <= one["flops_ratio"]


def test_the_page_says_what_the_results_say(tmp_path, monkeypatch):
    page = shutil.copy(gpu_counts.PAGE, tmp_path)
    monkeypatch.setattr(gpu_counts, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr("sys.argv", ["gpu_counts", "--tables"])
    before = gpu_counts.PAGE.read_text()
    gpu_counts.main()
    assert (tmp_path / "performance.md").read_text() == before, f"{page}: {AGAIN}"


SHAPE = ModelShape(matrix_parameters=0, attention_width=1, head_parameters=0, windows=(None,))


def cost(flops, attention):
    return Cost(tokens=1, attention_pairs=attention // 12, targets=0, flops=flops)


NPASS, SINGLE = cost(120, 48), cost(60, 36)


@pytest.mark.parametrize(("attention", "expected"), [(0.8, 1.94), (0.4, 1.70)])
def test_the_example(attention, expected):
    assert KernelSpeed(attention, 0.8).bound(NPASS, SINGLE, SHAPE) == pytest.approx(expected, abs=0.005)
