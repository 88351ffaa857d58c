"""The doctor on a small model: every field is filled, and what goes wrong is told and not the end."""

import json
from dataclasses import fields, replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from transformers import GptOssConfig

from support.tiny_models import tiny_model
from trl_singlepass.reference import doctor
from trl_singlepass.reference.doctor import DoctorReport, Subject, Verified, examine, layers_that_fit, slice_config
from trl_singlepass.reference.timing import Schedule


pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
CPU = torch.device("cpu")


def subject_of(family):
    model = tiny_model(family)

    def load(config, dtype, attention):
        torch.manual_seed(0)
        return type(model)._from_config(config, dtype=dtype, attn_implementation=attention)

    return Subject(family, model.config, load)


@pytest.fixture(scope="module")
def report():
    return examine(subject_of("qwen3"), CPU, turns=(2,))


def printed(report):
    console = Console(width=118, file=StringIO())
    console.print(report)
    return console.file.getvalue()


def test_every_field_is_filled(report):
    found = json.loads(json.dumps(report.to_dict()))
    assert found.keys() == {*(field.name for field in fields(DoctorReport)), "complaints", "ok"}
    assert [one["dtype"] for one in found["verified"]] == ["bfloat16", "float32"]
    pairs = [(one["turns"], one["schedule"]) for one in found["measured"]]
    assert pairs == [(2, schedule) for schedule in Schedule]
    for record in found["measured"]:
        assert [name for name, value in record.items() if value is None] == ["failed"], record
    assert all(one["check"]["leak"] == 0 for one in found["verified"])
    assert found["kernel"]["faster"] is None  # on a CPU
    assert "cpu_flash for full_attention" in found["kernel"]["reason"]
    assert found["ok"] is True


def test_times_are_compared_with_packed_npass(report):
    npass, single, waves, *_ = report.measured
    assert (npass.speedup, npass.bound) == (1, 1)
    assert single.speedup == npass.seconds / single.seconds
    assert single.bound == waves.bound > 1
    assert npass.tokens > single.tokens == waves.tokens


@pytest.mark.slow
def test_windows_sinks_and_experts_are_a_model_like_others():
    report = examine(subject_of("gpt-oss"), CPU, attn_implementation="eager", turns=(2,))
    assert report.ok, report.complaints
    assert report.kernel.attn_implementation == "eager"


def out_of_memory(*args):
    raise RuntimeError("out of memory\nand a page of advice")


def test_errors_are_noted_and_the_rest_runs(monkeypatch):
    monkeypatch.setattr("trl_singlepass.reference.timing.wave_tokens_that_keep_the_history", out_of_memory)
    subject = subject_of("qwen3")

    def load(config, dtype, attention):
        if dtype is torch.bfloat16:
            raise RuntimeError("no kernel image\nis available")
        return subject.load(config, dtype, attention)

    report = examine(replace(subject, load=load), CPU, turns=(2,))
    assert report.verified[0].found == "RuntimeError: no kernel image"
    assert report.verified[1].ok
    *others, waves = report.measured
    assert all(one.failed is None for one in others)
    assert (waves.seconds, waves.failed) == (None, "RuntimeError: out of memory")
    text = printed(report)
    assert "verify, bfloat16: failed" in text
    assert "waves, 2 turns: RuntimeError: out of memory" in text


def test_disagreement_is_a_complaint(report):
    wrong = replace(
        report, verified=(Verified("float32", "sdpa", False, "gradients differ", report.verified[0].check),)
    )
    assert wrong.complaints == ("verify in float32 on sdpa: gradients differ",)
    assert not wrong.ok
    assert "verify, float32: DIFFERS" in printed(wrong)


# The first layers of a model -----------------------------------------------------------------------------------------


SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
MIXED = GptOssConfig(**SMALL, num_key_value_heads=2, num_hidden_layers=12, num_local_experts=4)


def test_as_many_layers_run_as_fit(monkeypatch):
    def free_for(num_layers):
        needed = doctor._bytes_of_slice(slice_config(MIXED, num_layers), 1000)
        monkeypatch.setattr(doctor, "free_bytes", lambda device: needed / doctor.SHARE_OF_FREE_MEMORY + 1)

    free_for(3)
    assert layers_that_fit(MIXED, 1000, CPU) == 3
    free_for(1)
    with pytest.raises(ValueError, match=r"the first 2 of 12 layers fit.*name a smaller model"):  # one of each type
        layers_that_fit(MIXED, 1000, CPU)
