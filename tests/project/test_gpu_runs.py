"""`make gpu` as far as it goes without a GPU: which cases, one process each, resumed, failures written down."""

import argparse
import json
import sys
from dataclasses import asdict

import pytest
import torch

from benchmarks import gpu, gpu_step
from benchmarks.apart import run_apart
from benchmarks.gpu_step import LAYERS, Case, cases, measure_apart, run
from trl_singlepass.reference.timing import Schedule


ARGS = argparse.Namespace(models=[*LAYERS], turns=[16, 8], device="cpu", tiny=True, repeats=1)
TINY = [Case("Qwen3-0.6B", 2, schedule.value, "sdpa", "cpu", tiny=True, repeats=1) for schedule in Schedule]


# Cases of the benchmark ----------------------------------------------------------------------------------------------


def test_every_kernel_meets_packed_npass_on_every_model():
    found = list(cases(["sdpa", "flash_attention_3", "flex_attention"], ARGS))
    for model in LAYERS:
        for kernel in ("sdpa", "flash_attention_3"):
            for turns in ARGS.turns:
                schedules = {
                    one.schedule for one in found if (one.model, one.kernel, one.turns) == (model, kernel, turns)
                }
                assert schedules >= {"single_pass", "npass_packed"}
    assert len(set(found)) == len(found)
    assert {one.kernel for one in found if one.schedule == "waves"} == {"sdpa", "flash_attention_3"}


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_every_model_is_measured(model):
    single, npass = (
        gpu_step.measure(Case(model, 2, schedule, "sdpa", "cpu", tiny=True, repeats=1))
        for schedule in ("single_pass", "npass_packed")
    )
    assert single["loss"] == pytest.approx(npass["loss"], rel=0.02)  # bfloat16
    assert single["seconds"] > 0


# One process per case ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_case_runs_in_a_process_of_its_own():
    record = measure_apart(TINY[0], 120)
    assert record["seconds"] > 0, record
    assert record["bound"] > 1
    assert {**record, **asdict(TINY[0])} == record


@pytest.mark.parametrize(
    ("code", "failed"),
    [
        ("print('all is well')", None),
        ("raise RuntimeError('CUDA error: misaligned address')", "exit code 1: RuntimeError: CUDA error: misaligned"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit code -11: no message"),
        ("import time; print('all is well', flush=True); time.sleep(60)", "took longer than 2 seconds"),
    ],
)
def test_how_a_process_ends(code, failed):
    outcome = run_apart([sys.executable, "-c", code], 2)
    assert (outcome.failed or "").startswith(failed or "")
    assert (outcome.failed is None) == (failed is None)
    assert outcome.output.strip() in ("all is well", "")


# Resuming ------------------------------------------------------------------------------------------------------------


def fake(monkeypatch, **failures):
    asked = []

    def measure(case, seconds):
        asked.append(case.schedule)
        result = {"failed": failures[case.schedule]} if case.schedule in failures else {"seconds": 1.0, "bytes": 1}
        return {**asdict(case), **result}

    monkeypatch.setattr(gpu_step, "measure_apart", measure)
    return asked


def test_the_next_run_goes_on_where_this_one_stopped(monkeypatch, tmp_path):
    path, asked = tmp_path / "r.json", fake(monkeypatch, waves="exit code 1: RuntimeError: CUDA error")
    assert run(path, {"measured": []}, TINY, seconds=0) == 3
    assert asked == []
    assert run(path, {"measured": []}, TINY[:1], seconds=60) == 0
    assert run(path, json.loads(path.read_text()), TINY, seconds=60) == 0
    assert asked == ["npass_packed", "single_pass", "waves"]  # each once, and a failure is a result
    records = json.loads(path.read_text())["measured"]
    assert [record.get("failed") for record in records] == [None, None, "exit code 1: RuntimeError: CUDA error"]
    assert run(path, json.loads(path.read_text()), TINY, seconds=60) == 0
    assert len(asked) == 3


def test_a_case_that_the_end_cuts_off_is_left_for_the_next_run(monkeypatch, tmp_path):
    fake(monkeypatch, single_pass="took longer than 20 seconds")
    assert run(tmp_path / "r.json", {"measured": []}, TINY, seconds=20) == 2
    assert run(tmp_path / "r.json", {"measured": []}, TINY, seconds=1000) == 0  # it had all its time


# Tests ---------------------------------------------------------------------------------------------------------------

GPU_TESTS = """
import os, pathlib, pytest
pytestmark = pytest.mark.gpu
broken = []

def test_passes(): pass
def test_breaks_the_context(): broken.append(1); assert False
def test_fails_only_after_it(): assert not broken
def test_is_skipped(): pytest.skip("no such package")
@pytest.mark.parametrize("size", [1, 2])
def test_ends_the_process(size):
    if size == 2: os._exit(9)
def test_is_not_reached_together(): pass
"""


@pytest.mark.slow
def test_a_test_that_breaks_the_process_spoils_no_other(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(GPU_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -m 'not gpu'\n")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.json"
    found = gpu.run_tests(path, 300)
    names = {test.partition("::")[2]: outcome for test, outcome in found.items()}
    assert names.pop("test_ends_the_process[2]") == "did not end: exit code 9: no message"
    assert names == {
        "test_passes": "PASSED",
        "test_breaks_the_context": "FAILED",
        "test_fails_only_after_it": "PASSED",
        "test_is_skipped": "SKIPPED",
        "test_ends_the_process[1]": "PASSED",
        "test_is_not_reached_together": "PASSED",
    }
    assert json.loads(path.read_text()) == found
    ran = []
    monkeypatch.setattr(gpu, "outcomes", lambda tests, seconds: ran.extend(tests) or dict.fromkeys(tests, "PASSED"))
    assert set(gpu.run_tests(path, 300).values()) == {"PASSED"}
    assert [test.partition("::")[2] for test in ran] == [
        "test_breaks_the_context", "test_is_skipped", "test_ends_the_process[2]"
    ]  # fmt: skip


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_ends_at_once_with_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match=gpu.NO_GPU):
        gpu.main()
