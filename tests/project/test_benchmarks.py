"""The benchmark's modes are the same training step, and its report says what was measured."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from benchmarks import report
from benchmarks.conversations import conversation
from benchmarks.modes import MODES, Step
from benchmarks.shapes import SHAPES, read_shapes, samples_of, shape_of
from benchmarks.step_time import TINY_MODEL, TINY_SIZES, Case, counted
from trl_singlepass import PrefixTree


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


@pytest.mark.parametrize("mode", ["single_pass", "npass_padded", "npass_packed"])
def test_modes_are_the_same_training_step(mode, reference):
    loss, gradient = loss_and_gradient(mode)
    assert loss == pytest.approx(reference[0], rel=1e-6)
    assert (gradient - reference[1]).norm() <= 1e-5 * reference[1].norm()


def test_what_is_done_instead_is_another_step(reference):
    for mode in ("last_turn", "keep_reasoning"):
        loss, gradient = loss_and_gradient(mode)
        assert loss != pytest.approx(reference[0], rel=1e-4)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [path.stem for path in SHAPES.glob("*.json")])
def test_samples_in_a_shape_share_what_the_shape_says(name):
    for shapes in read_shapes(name):
        for policy in ("template", "keep"):
            samples = samples_of(shapes[policy], vocabulary=1000)
            assert shape_of(samples) == shapes[policy]
        assert len(PrefixTree.from_samples(samples)) == max(map(len, samples))  # all reasoning kept: one chain


def test_samples_that_leave_one_at_the_same_place_share_nothing_more():
    sizes = {"source": 0, "prompt": 5, "reasoning": 0, "length": 10}
    shape = [{**sizes, "shared": shared} for shared in (0, 5, 5)]
    assert shape_of(samples_of(shape, vocabulary=1000)) == shape


def test_causal_row_is_as_long_as_the_tree_and_not_the_same_step(reference):
    loss, gradient = loss_and_gradient("causal_row")
    assert loss != pytest.approx(reference[0], rel=1e-4)
    assert gradient.isfinite().all()


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
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    (tmp_path / "speed.json").write_text(json.dumps(SPEED))
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main()
    text = (tmp_path / "README.md").read_text()
    assert "| one by one | 4.00 s | 2.00 s | **2.00** |" in text
    assert "| 2 | 2.00 s | 1.50 s | 1.00 s |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_report_refuses_measurements_of_different_steps():
    wrong = result(measured("single_pass", 1.0, loss=1.1), measured("npass_sequential", 2.0))
    with pytest.raises(ValueError, match=r"single_pass computed loss 1\.1, N-pass 1\.0: not the same training step"):
        report.speed_rows(wrong)


def test_report_gives_the_ratio_of_peak_memory():
    memory = result(
        measured("single_pass", 1.0, bytes=3 * 2**20), measured("causal_row", 1.0, bytes=2**21), kind="row_memory"
    )
    assert "3 MiB as a tree, 2 MiB as a plain causal row (ratio 1.50)" in report.memory_section(memory, "memory.json")
