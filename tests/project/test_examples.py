"""The example scripts run, and TRL's own differs from ours in two lines."""

import difflib
import os
import sys
import time
from pathlib import Path

import pytest
import trl
from packaging.version import Version

from support.small_repository import DEMO_DATA, ROOT, as_a_reader, make_small_repository, run_python


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
SMALL = ["--bf16", "false", "--max_steps", "1", "--save_strategy", "no", "--report_to", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_repository(tmp_path_factory.mktemp("repository"))


def run(folder, name, *arguments):
    with as_a_reader(folder) as patch:
        run_python([f"examples/{name}.py", *arguments], patch)


@pytest.mark.skipif(Version(trl.__version__).release[:2] != (1, 16), reason="the example is the script of TRL 1.16")
def test_trls_script_needs_two_lines():
    theirs = (Path(trl.__file__).parent / "scripts" / "sft.py").read_text().splitlines()
    ours = (ROOT / "examples" / "sft.py").read_text().splitlines()
    changes = [line for line in difflib.ndiff(theirs, ours) if line[0] in "+-"]
    assert changes == [
        "+     from trl_singlepass import SinglePassSFTTrainer as SFTTrainer  # changed from TRL's script",
        "+     from trl_singlepass import SinglePassSFTConfig as SFTConfig  # changed from TRL's script",
    ]


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="the example is the script of TRL 1.16")
def test_trls_script_trains_in_one_pass(folder):
    arguments = ["--model_name_or_path", "out/demo-model", "--dataset_name", "out/sft-data", "--output_dir", "out/sft"]
    (folder / "out" / "sft-data").mkdir()
    (folder / "out" / "sft-data" / "train.jsonl").symlink_to(folder / DEMO_DATA)
    run(folder, "sft", *arguments, *SMALL, "--packing", "--max_row_tokens", "4096")
    assert (folder / "out" / "sft" / "model.safetensors").is_file()


def test_pairs_of_several_turns_are_trained(folder):
    run(folder, "preference", "--max_steps", "1")
    assert (folder / "out" / "preference" / "model.safetensors").is_file()


def test_completions_are_rewarded_in_groups(folder):
    run(folder, "grpo", "--max_steps", "1")
    assert (folder / "out" / "grpo" / "model.safetensors").is_file()


def test_an_agent_is_rewarded_for_rollouts_of_several_requests(folder):
    run(folder, "agent_grpo", "--max_steps", "1")
    assert (folder / "out" / "agent-grpo" / "model.safetensors").is_file()


def test_agent_turns_are_logged_and_trained(folder):
    run(folder, "agent_turns", "--max_steps", "1")
    lines = (folder / "out" / "agent-turns.jsonl").read_text().splitlines()
    turns = (folder / DEMO_DATA).read_text().count('"role": "assistant"')
    assert len(lines) == turns
    assert (folder / "out" / "agent-turns" / "model.safetensors").is_file()


def test_histories_are_compared(folder, capsys):
    run(folder, "compare_histories", "--max_steps", "1")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows if row and row[0] in ("template", "keep", "strip")}
    assert list(found) == ["template", "keep", "strip"]
    assert len({tuple(row) for row in found.values()}) == 3


@pytest.mark.slow
def test_an_agent_that_looks_at_screens_is_trained(folder, capsys):
    run(folder, "screen_agent", "--episodes", "1", "--turns", "4", "--window", "2", "--max_steps", "1")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows if row}
    assert found["images encoded"] == ["7", "4", "1.75"]
    assert float(found["loss"][0]) == pytest.approx(float(found["loss"][1]), abs=2e-6)
    assert (folder / "out" / "screen-agent" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_notebook_runs_on_a_cpu_in_three_minutes(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    start = time.monotonic()
    nbclient.NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.monotonic() - start < 180
    assert (tmp_path / "out" / "quickstart" / "model.safetensors").is_file()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert "\nstep 30: loss " in "".join(output.get("text", "") for output in outputs)
