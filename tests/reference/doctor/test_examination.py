"""The doctor on a small model: every field is filled, and what goes wrong is told and not the end."""

import json
from dataclasses import fields, replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from support.tiny_families import FAMILIES, tiny_model
from trl_singlepass.reference.doctor import Subject, examine
from trl_singlepass.reference.doctor.report import DoctorReport, Measured, Verified
from trl_singlepass.reference.doctor.table import render_report
from trl_singlepass.reference.launches import LaunchCounter
from trl_singlepass.reference.steps import Schedule


pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
CPU = torch.device("cpu")


def subject_of(family):
    config = tiny_model(family).config

    def load(config, dtype, attention):
        model_class = FAMILIES[family][0]
        torch.manual_seed(0)
        return model_class._from_config(config, dtype=dtype, attn_implementation=attention)

    return Subject(family, config, None, load)


@pytest.fixture(scope="module")
def report():
    return examine(subject_of("qwen3"), CPU, turns=(2, 3))


def printed(report):
    console = Console(width=118, file=StringIO())
    console.print(render_report(report))
    return console.file.getvalue()


def test_every_field_is_filled(report):
    found = json.loads(json.dumps(report.to_dict()))
    assert found.keys() == {*(field.name for field in fields(DoctorReport)), "complaints", "ok"}
    assert [one["dtype"] for one in found["verified"]] == ["bfloat16", "float32"]
    pairs = [(one["turns"], one["schedule"]) for one in found["measured"]]
    assert pairs == [(turns, schedule) for turns in (2, 3) for schedule in Schedule]
    for record in (*found["verified"], *found["measured"]):
        assert [name for name, value in record.items() if value is None] == ["failed"], record
    assert found["kernel"]["operators"]
    assert found["kernel"]["faster"] is None  # on a CPU
    assert "cpu_flash for full_attention" in found["kernel"]["reason"]
    assert found["ok"] is True


def test_times_are_compared_with_packed_npass(report):
    npass, single, waves, *_ = report.measured
    assert (npass.speedup, npass.bound) == (1, 1)
    assert single.speedup == npass.seconds / single.seconds
    assert single.bound == waves.bound > 1
    assert npass.tokens > single.tokens == waves.tokens
    assert waves.launches > single.launches


def test_the_table_has_a_row_for_everything(report):
    text = printed(report)
    for expected in (
        "verify, bfloat16: agrees",
        "N-pass, packed",
        "single pass in waves",
        "Nothing is wrong",
        "tree_",
    ):
        assert expected in text


def test_what_is_faster_is_printed(report):
    assert "install another" in printed(replace(report, kernel=replace(report.kernel, faster="install another")))


@pytest.mark.slow
def test_windows_sinks_and_experts_are_a_model_like_others():
    report = examine(subject_of("gpt-oss"), CPU, attn_implementation="eager", turns=(2,))
    assert report.ok, report.complaints
    assert report.kernel.attn_implementation == "eager"


def test_an_error_is_noted_and_the_rest_runs():
    subject = subject_of("qwen3")

    def load(config, dtype, attention):
        if dtype is torch.bfloat16:
            raise RuntimeError("no kernel image\nis available")
        return subject.load(config, dtype, attention)

    report = examine(replace(subject, load=load), CPU, turns=(2,))
    assert report.verified[0].failed == "RuntimeError: no kernel image"
    assert report.verified[1].ok
    assert report.complaints == ("verify in bfloat16 on default: RuntimeError: no kernel image",)
    assert "verify, bfloat16: failed" in printed(report)


def test_a_step_that_fails_has_no_time(monkeypatch):
    monkeypatch.setattr("trl_singlepass.reference.steps.wave_tokens_that_keep_the_history", out_of_memory)
    report = examine(subject_of("qwen3"), CPU, turns=(2,))
    *others, waves = report.measured
    assert all(one.failed is None for one in others)
    assert (waves.seconds, waves.failed) == (None, "RuntimeError: out of memory")
    assert "waves, 2 turns: RuntimeError: out of memory" in printed(report)


def out_of_memory(*args):
    raise RuntimeError("out of memory\nand a page of advice")


def test_disagreement_is_a_complaint(report):
    check = Verified("float32", "sdpa", False, 7, 1.0, 1e-6, 1.0, 1e-6, 0.0, None)
    wrong = replace(report, verified=(check,))
    assert wrong.complaints == ("verify in float32 on sdpa: the single pass does not equal N-pass",)
    assert "verify, float32: DIFFERS" in printed(wrong)


def test_a_model_that_cannot_be_counted_is_timed_without_a_bound(report):
    unknown = replace(report.measured[0], bound=None)
    assert isinstance(unknown, Measured)
    assert "N-pass, packed" in printed(replace(report, measured=(unknown,)))


@pytest.mark.slow
def test_what_runs_compiled_is_timed_and_not_counted(report, monkeypatch):
    def refuse(self, func, types, args=(), kwargs=None):
        raise NotImplementedError("no rule registered for HigherOrderOperator flex_attention")

    monkeypatch.setattr(LaunchCounter, "__torch_dispatch__", refuse)
    compiled = examine(subject_of("qwen3"), CPU, turns=(1,))
    assert [one.launches for one in compiled.measured] == [None] * 3
    assert all(one.seconds > 0 for one in compiled.measured)
    assert compiled.kernel.operators is None
    assert "attention is compiled" in printed(compiled)
