"""The benchmark's modes are the same training step, and its report says what was measured."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from benchmarks import groups, report, screen_agent, step_profile
from benchmarks.modes import MODES, Step
from benchmarks.shapes import SHAPES, get_shape, make_samples, read_shapes
from benchmarks.step_time import TINY_MODEL, TINY_SIZES, Case, counted
from trl_singlepass import PrefixTree
from trl_singlepass.reference.timing import conversation


ROOT = Path(__file__).parents[2]
SAMPLES = conversation(3, TINY_MODEL["vocab_size"], seed=0, sizes=TINY_SIZES)
KEPT = conversation(3, TINY_MODEL["vocab_size"], seed=0, sizes=TINY_SIZES, keep=True)


def loss_and_gradient(mode):
    set_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY_MODEL))
    loss = MODES[mode](Step(model, SAMPLES, KEPT))()
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def reference():
    return loss_and_gradient("npass_sequential")


@pytest.mark.parametrize("mode", ["single_pass", "waves", "npass_padded", "npass_packed"])
def test_modes_are_the_same_training_step(mode, reference):
    loss, gradient = loss_and_gradient(mode)
    assert loss == pytest.approx(reference[0], rel=1e-6)
    assert (gradient - reference[1]).norm() <= 1e-5 * reference[1].norm()


@pytest.mark.parametrize("name", [path.stem for path in SHAPES.glob("*.json")])
def test_samples_in_a_shape_share_what_the_shape_says(name):
    for shapes in read_shapes(name):
        for policy in ("template", "keep"):
            samples = make_samples(shapes[policy], vocabulary=1000)
            assert get_shape(samples) == shapes[policy]
        assert len(PrefixTree.from_samples(samples)) == max(map(len, samples))  # all reasoning kept: one chain


def measured(mode, seconds, **changes):
    return {"mode": mode, "turns": 2, "seconds": seconds, "bytes": 2**20, "loss": 1.0, "norm": 2.0, **changes}


def result(*measurements, kind="step_time"):
    return {
        "kind": kind,
        "date": "2026-01-01",
        "commit": "0123456789",
        "machine": {"processor": "P", "cores": 1, "device": "cpu"},
        "versions": {"torch": "2.6"},
        "model": TINY_MODEL,
        "dtype": "float32",
        "counted": [counted(Case("", 2, 0, True, "cpu", "float32"))],
        "measured": list(measurements),
    }


SPEED = result(
    measured("single_pass", 3.0),
    measured("npass_sequential", 4.0),
    measured("npass_padded", 9.0),
    measured("single_pass", 2.0),
    measured("npass_sequential", 5.0),
    measured("npass_padded", 8.0),
    measured("last_turn", 1.0, loss=1.5),
    measured("keep_reasoning", 1.5, norm=3.0),
)


def test_report_compares_the_fastest_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "speed.json").write_text(json.dumps(SPEED))
    text = report.report()
    assert "| 4.00 s | 2.00 s | **2.00** |" in text
    assert "| 2 | 2.00 s | 1.50 s | 1.00 s |" in text


def test_the_table_of_waves_compares_memory_and_time(monkeypatch):
    monkeypatch.setattr(report, "SUMMARY_TURNS", (2,))
    modes = {"single_pass": 2.0, "waves": 3.0, "npass_sequential": 6.0}
    speed = result(*(measured(mode, seconds) for mode, seconds in modes.items()))
    (line,) = report.waves_table(speed).splitlines()[2:]
    assert line.startswith("| 2 | ")
    assert line.endswith(" | 1 MiB | 3.00 | 2.00 |")


def test_pages_say_what_the_committed_results_say(tmp_path, monkeypatch):
    for name in ("README", "PAGE", "CHECK"):
        page = getattr(report, name)
        monkeypatch.setattr(report, name, tmp_path / page.name)
        shutil.copy(page, tmp_path)
    report.main()
    for page in (ROOT / name for name in ("README.md", "docs/performance.md", "docs/own_loops.md")):
        assert (tmp_path / page.name).read_text() == page.read_text()


@pytest.mark.parametrize("kind", ["step_time", "step_time_shapes"])
def test_the_recorded_speed_is_what_counted_operations_allow(kind):
    ((_, recorded),) = report.read(kind)
    for row in report.speed_rows(recorded):
        of = dict(zip(report.SPEED_HEADER, row, strict=True))
        assert float(of["**speed-up**"].strip("*")) >= 0.92 * float(of["predicted"]), row


def test_report_refuses_measurements_of_different_steps():
    wrong = result(measured("single_pass", 1.0, loss=1.1), measured("npass_sequential", 2.0))
    with pytest.raises(ValueError, match=r"single_pass computed loss 1\.1, npass_sequential 1\.0: not the same"):
        report.speed_rows(wrong)


@pytest.mark.parametrize("mode", step_profile.MODES)
def test_the_profile_finds_matrix_products_and_attention(mode):
    seconds = step_profile.seconds_by_kind(Case(mode, 2, 0, True, "cpu", "float32"))
    assert list(seconds) == ["matrix products", "attention", "everything else"]
    assert min(seconds.values()) > 0


def test_the_table_of_screens_is_the_measurement():
    results = json.loads(screen_agent.RESULTS.read_text())
    page = screen_agent.PAGE.read_text()
    assert screen_agent.START + screen_agent.table_of(results) + screen_agent.END in page
    for figures in results["cases"].values():
        assert figures["single_pass"]["encodings"] == results["turns"]
        assert figures["largest_gradient_difference"] < 2e-6


def test_groups_are_the_same_step_on_lines_and_on_trees():
    losses, gradients = [], []
    for mode in groups.MODES:
        model = groups.make_model(mode == "tree", groups.TINY)
        losses.append(groups.step(mode, model, (20, 5, 3), groups.TINY["vocab_size"]))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert float(losses[1]) == pytest.approx(float(losses[0]), abs=1e-6)
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_rollouts_are_the_same_step_on_rows_of_requests_and_on_trees():
    losses = []
    for mode in ("requests", "tree", "appended"):
        model = groups.make_model(mode == "tree", groups.TINY)
        losses.append(float(groups.rollout_step(mode, model, 4, groups.TINY["vocab_size"], scale=10)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-4  # TRL's line trains something else


def test_the_table_of_rollouts_is_the_measurement():
    result = json.loads(groups.ROLLOUT_RESULTS.read_text())
    assert (
        "\n".join(groups.rollout_table(result["rows"])) in (groups.RESULTS.parents[2] / "docs/groups.md").read_text()
    )


def test_groups_are_counted_as_their_file_says():
    result = json.loads(groups.RESULTS.read_text())
    sizes = [(row["prompt"], row["completion"], row["group"]) for row in result["rows"]]
    assert sizes == list(groups.product(groups.PROMPTS, groups.COMPLETIONS, groups.GROUPS))
    for size, row in zip(sizes[:3], result["rows"], strict=False):
        assert groups.count(size, result["model"]) == {name: row[name] for name in ("tokens", "flops")}
