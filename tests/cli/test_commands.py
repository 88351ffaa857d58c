"""Each command on a tiny model and a small file."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.load import load_model as load_demo_model
from demo.load import load_tokenizer as load_demo_tokenizer
from support.conversations import chat
from trl_singlepass.cli.loading import load_model
from trl_singlepass.cli.main import ALIASES, COMMANDS
from trl_singlepass.reference import doctor


def test_inspect_shows_the_tree(run, model, data, tmp_path):
    code, out, err = run(
        "inspect", model, data, "--row", 2, "--html", tmp_path / "p.html", "--png", tmp_path / "p.png"
    )
    assert code == 0, err
    assert "3 turns" in out
    assert "turn 3 ends here" in out
    assert "</html>" in (tmp_path / "p.html").read_text()
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert (tmp_path / "p-mask.png").stat().st_size > 1000


def test_audit_prints_writes_json_and_a_page(run, model, data, tmp_path):
    code, out, err = run("audit", model, data, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    assert code == 0, err
    assert "sharing factor" in out
    assert "Auditing conversations" in err or "Reading" in err or err.startswith("Next")  # bars may be disabled
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["num_rows"] == 4
    assert report["forecast"]["has_model"]
    page = (tmp_path / "a.html").read_text()
    assert all(word in page for word in ("Findings", "Tokens per sample", "N-pass of maximal chains"))
    code, out, _ = run("audit", model, data, "--json", "-", "--sample_size", 2)
    assert json.loads(out)["num_audited"] == 2


@pytest.mark.parametrize("output", [[], ["--json", "-"]], ids=["tables", "json"])
def test_audit_fails_if_no_row_can_be_trained(run, model, tmp_path, output):
    unanswered, answered = ({"messages": chat(1)[:length]} for length in (2, 3))
    (tmp_path / "none.jsonl").write_text(json.dumps(unanswered) + "\n")
    (tmp_path / "some.jsonl").write_text(f"{json.dumps(unanswered)}\n{json.dumps(answered)}\n")
    code, out, _ = run("audit", model, tmp_path / "none.jsonl", *output)
    assert code == 1
    assert out.strip()
    assert run("audit", model, tmp_path / "some.jsonl", *output)[0] == 0


def test_verify_tells_agreement(run, model, data):
    code, out, err = run("verify", model, data, "-n", 3)
    assert code == 0, err
    assert "equals N-pass" in out
    assert {line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│   ")} >= {"0", "1", "2"}


def test_verify_exits_with_1_on_disagreement(run, model, data, monkeypatch):
    from trl_singlepass.reference import single_pass

    original = single_pass.make_batch

    def moved(*args):
        batch = original(*args)
        batch["position_ids"] = batch["position_ids"] + (batch["position_ids"] > 9)
        return batch

    monkeypatch.setattr(single_pass, "make_batch", moved)
    code, out, _ = run("verify", model, data, "-n", 1)
    assert code == 1
    assert "does NOT equal" in out


def test_bench_times_both_with_the_forecast_beside(run, model, data):
    code, out, err = run("bench", model, data, "-n", 2, "--repeats", 1)
    assert code == 0, err
    assert "seconds, measured" in out
    assert "TFLOP, counted" in out
    assert "2 conversations, 5 turns" in out


@pytest.mark.slow  # the block of docs/commands.md runs by default
def test_doctor_checks_and_measures_a_model(run, tmp_path):
    """On the demo's model, in under a minute of processor time."""
    model, file = tmp_path / "model", tmp_path / "out" / "doctor.json"
    tokenizer = load_demo_tokenizer(None)
    load_demo_model(None, tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    start = time.process_time()
    code, out, err = run("doctor", model, "--json", file)
    assert time.process_time() - start < 60
    found = json.loads(file.read_text())
    assert code == 0, (found["complaints"], err)
    assert "single pass in waves" in out
    assert (found["model"]["num_layers"], found["model"]["total_layers"]) == (4, 4)
    assert [one["turns"] for one in found["measured"][::3]] == [2, 8, 16]


@pytest.mark.slow
def test_doctor_runs_the_first_layers_with_their_weights(run, model, monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "MOST_LAYERS_ON_CPU", 1)
    monkeypatch.setattr(doctor, "verify_samples", lambda loaded, *args: seen.append(loaded.state_dict()) or 1 / 0)
    code, out, err = run("doctor", model, "--turns", 1, "--json", "-")
    found = json.loads(out)
    assert code == 1
    assert (found["model"]["num_layers"], found["model"]["total_layers"]) == (1, 2)
    assert found["verified"][0]["found"] == "ZeroDivisionError: division by zero"
    whole = load_model(model, dtype="float32", attn_implementation=None, device="cpu").state_dict()
    assert {name.split(".")[2] for name in seen[1] if "layers" in name} == {"0"}
    assert all(torch.equal(whole[name], weight) for name, weight in seen[1].items())
    assert "UNEXPECTED" not in err


def test_doctor_refuses_a_model_without_its_weights(run, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code, _, err = run("doctor", folder, "--turns", 1)
    assert code == 2
    assert "has no weights for model.layers.0.mlp.up_proj.weight" in err


def test_doctor_needs_no_model_and_exits_with_1_where_something_is_wrong(run, monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(doctor, "verify_samples", fail)
    code, out, _ = run("doctor", "--turns", 1, "--json", "-")
    found = json.loads(out)
    assert code == 1
    assert found["model"]["name"] == "built-in"
    assert [one["found"] for one in found["verified"]] == [
        "RuntimeError: CUDA error: an illegal memory access was encountered"
    ] * 2
    assert all(one["seconds"] > 0 for one in found["measured"])


def test_a_chat_template_file_takes_the_place_of_the_tokenizers(run, model, data, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ bad_function() }}")
    _, out, _ = run("audit", model, data, "--chat_template", tmp_path / "t.jinja")
    assert "4 of 4 rows cannot be trained" in out


def test_text_of_the_data_is_escaped_in_the_audit_page(run, model, tmp_path):
    row = {"messages": [{"role": "<script>alert(1)</script>[red]", "content": "x"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"messages": chat(1)}) + "\n")
    _, out, _ = run("audit", model, tmp_path / "x.jsonl", "--html", tmp_path / "x.html")
    assert "[red]" in "".join(part.strip("│ ") for part in out.replace("\n", ""))
    page = (tmp_path / "x.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("command", ["inspect", "audit", "verify"])
def test_a_command_names_the_next(run, model, data, command):
    code, _, err = run(command, model, data)
    assert code == 0
    (line,) = [line for line in err.splitlines() if line.startswith("Next: trl-singlepass ")]
    assert line.split()[2] in COMMANDS
    assert model in line
    assert data in line


def test_every_command_of_the_first_hour_has_a_next_one():
    following = {name: command.next.split()[0] for name, command in COMMANDS.items() if command.next}
    assert {*following, *ALIASES.values(), "dpo", "grpo", "rloo"} == set(COMMANDS)
    assert set(following.values()) <= set(COMMANDS)
