"""Help, version, and every error in one line."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

import trl_singlepass
from support.chat_tokenizers import make_tokenizer
from support.small_files import UNREADABLE
from trl_singlepass.cli.arguments import ADD_ARGUMENTS, CUT_OFF, INTERRUPTED, CommandParser
from trl_singlepass.cli.main import COMMANDS, check_hub, main
from trl_singlepass.scripts import SCRIPTS


ROOT = Path(__file__).parents[2]


def test_help_names_every_command(run):
    for arguments in ([], ["--help"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert all(name in out for name in COMMANDS)


def test_version(run):
    assert run("--version") == (0, f"trl-singlepass {trl_singlepass.__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(name, capsys):
    with contextlib.suppress(SystemExit):  # argparse ends the process after its help
        assert main([name, "--help"]) == 0
    assert f"trl-singlepass {name} " in capsys.readouterr().out.split("example:")[1]


@pytest.mark.parametrize("name", ["--version", *(f"{name} --help" for name in COMMANDS if name not in SCRIPTS)])
def test_help_imports_no_library_that_takes_seconds(name):
    code = f"""
import sys
from trl_singlepass.cli import main
try:
    main({name.split()!r})
except SystemExit:
    pass
heavy = {{"torch", "transformers", "datasets", "accelerate"}} & sys.modules.keys()
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ADD_ARGUMENTS)
def test_examples_parse(name):
    parser = CommandParser()
    ADD_ARGUMENTS[name](parser)
    args = parser.parse(COMMANDS[name].example.partition(" > ")[0].split()[2:])
    assert getattr(args, "model", "Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert getattr(args, "data", "data.jsonl") == "data.jsonl"


CPU = ["--output_dir", "x", "--use_cpu", "--bf16", "false"]
ERRORS = [
    (["frobnicate"], "There is no command 'frobnicate', only train, dpo, grpo"),
    (["tran"], "Did you mean train?"),
    (["inspct", "{model}"], "Did you mean inspect?"),
    (["inspect", "{model}"], "the following arguments are required: DATA"),
    (["audit", "{model}", "{tmp}/latin.jsonl"], "latin.jsonl is not encoded in UTF-8"),
    (["audit", "{model}", "{tmp}/latin.json"], "latin.json cannot be read"),
    (["audit", "{model}", "{tmp}/latin.csv"], "latin.csv is not encoded in UTF-8"),
    (["audit", "{model}", "{tmp}/uneven.csv"], "uneven.csv cannot be read"),
    (["inspect", "{model}", "{data}", "--rwo", "1"], "no argument is called --rwo. Did you mean --row?"),
    (["inspect", "{model}", "{data}", "--row", "x"], "argument --row: invalid"),
    (["inspect", "{model}", "{data}", "--row", "9"], "has 4 rows, counted from 0"),
    (["inspect", "{model}", "{data}", "--config"], "--config needs a YAML file"),
    (["inspect", "{model}", "{data}", "--config", "{tmp}/none.yaml"], "none.yaml"),
    (["inspect", "{model}", "{tmp}/none.jsonl"], "There is no file"),
    (["inspect", "{model}", "{tmp}/empty.jsonl"], "is empty. Expected one JSON object per line"),
    (["inspect", "{model}", "{tmp}/broken.jsonl"], "row 0: not JSON"),
    (["inspect", "{model}", "{tmp}/list.jsonl"], "expected a JSON object, got list"),
    (["inspect", "{model}", "{tmp}/text.txt"], "Expected a file that ends in .jsonl"),
    (["inspect", "{model}", "{tmp}/user.jsonl"], "Row 0: Expected at least one assistant message"),
    (["verify", "{model}", "{tmp}/user.jsonl"], "Row 0: Expected at least one assistant message"),
    (["audit", "{model}", "no-such/dataset"], "is neither a file nor a dataset that can be loaded"),
    (["audit", "no-such/model", "{data}"], "no-such/model cannot be loaded"),
    (["audit", "{model}", "{data}", "--chat_template", "none.jinja"], "There is no file none.jinja"),
    (["audit", "{tmp}/bare", "{data}"], "has no chat template. Give one with --chat_template"),
    (["audit", "{model}", "{data}", "--sample_size", "0"], "sample_size must be 1 or more"),
    (["verify", "{model}", "{data}", "-n", "0"], "-n must be 1 or more"),
    (["verify", "{model}", "{data}", "--dtype", "int8"], "invalid choice"),
    (["bench", "{model}", "{data}", "--repeats", "0"], "--repeats must be 1 or more"),
    (["doctor", "{model}", "--turns", "2,x"], "--turns takes numbers of turns with commas between them"),
    (["doctor", "{model}", "{data}"], "no argument is called"),
    (["chat", "{model}", "--history", "none"], "argument --history: invalid choice: 'none'"),
    (["chat", "{tmp}/bare"], "has no chat template. Give one with --chat_template"),
    (["doctor", "{tmp}/bare"], "has no config.json. Expected a folder with a model"),
    (
        ["train", "--accelerate_config", "none", *CPU],
        "is neither a file nor one of",
    ),
    (["train", "--learning_rate", "x"], "--learning-rate: invalid float value"),
    (["train", "--max_stps", "5", *CPU], "no argument is called --max_stps. Did you mean --max_steps?"),
    (["train", "--num_proceses", "2", *CPU], "no argument is called --num_proceses. Did you mean --num_processes?"),
    (["train", "--num_processes", "2", *CPU], "--num_processes 2 would start one process here. Add --multi_gpu"),
    (["train", "--num_processes", "x", *CPU], "argument --num_processes/--num-processes: invalid int value: 'x'"),
    (
        ["train", "--config", "{tmp}/typo.yaml", *CPU],
        "typo.yaml: no argument is called --max_stps. Did you mean --max_steps?",
    ),
    (["dpo", "--bta", "1", *CPU], "no argument is called --bta. Did you mean --beta?"),
    (["dpo", "--model_name_or_path", "no-such/model", *CPU], "no-such/model cannot be loaded"),
    (["audit", "{model}", "{data}", "--config", "{tmp}/typo.yaml"], "typo.yaml: no argument is called --max_stps."),
    (["train", "--model_name_or_path", "no-such/model", *CPU], "no-such/model cannot be loaded"),
    (["import", "nosuch", "{data}", "-o", "{tmp}/out"], "argument SOURCE: invalid choice: 'nosuch' (choose from "),
    (["import", "codex", "none.jsonl", "-o", "{tmp}/out"], "There is no none.jsonl. Give files, or folders that"),
    (["import", "openai-chat", "{tmp}/typo.jsonl", "-o", "{tmp}/out"], "typo.jsonl:1: 'messages' is missing."),
    (["demo-model"], "the following arguments are required: FOLDER"),
    (["demo-model", "{data}"], "is a file. Expected a folder to write"),
    (["demo-data", "{tmp}"], "IsADirectoryError"),
    (["verify", "no/such/folder", "{data}"], "it is neither a folder nor the id of a model"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    texts = {"empty.jsonl": "\n", "broken.jsonl": "{nope\n", "list.jsonl": "[1]\n", "text.txt": "x"}
    for name, text in {**texts, "typo.yaml": "max_stps: 5", "typo.jsonl": '{"msgs": []}'}.items():
        (folder / name).write_text(text)
    (folder / "user.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    for name, text in UNREADABLE.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    make_tokenizer(None).save_pretrained(folder / "bare")
    return folder


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_errors_are_one_clear_line(run, model, data, broken, arguments, message):
    code, out, err = run(*(argument.format(model=model, data=data, tmp=broken) for argument in arguments))
    lines = [line for line in err.splitlines() if line.startswith("trl-singlepass")]
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert message in err[err.index(lines[0]) :]  # one line, or one more for each reason of bad rows
    assert "Traceback" not in err


def test_debug_shows_where(model, broken):
    with pytest.raises(ValueError, match="Row 0"):
        main(["inspect", model, str(broken / "user.jsonl"), "--debug"])


def test_output_that_nobody_reads_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does when it has its lines
    command = [sys.executable, "-c", "from trl_singlepass.cli import main; raise SystemExit(main(['recipes']))"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (CUT_OFF, b"")


def test_ctrl_c_is_a_line(monkeypatch, run):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_singlepass.cli.file_commands.find_recipes", lambda: interrupt("recipes"))
    assert run("recipes") == (INTERRUPTED, "", "\ntrl-singlepass recipes: Interrupted.\n")


# Without a network: one attempt, then only what is cached ------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch):
    """A Hub that never answers: an address of a network for documentation, to which nothing is routed."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.mark.usefixtures("endpoint")
def test_a_wrong_model_fails_fast_without_a_network():
    start = time.monotonic()
    with pytest.raises(ValueError, match="no-such/model cannot be loaded: it is neither a folder nor in the cache"):
        check_hub("no-such/model", None)
    assert time.monotonic() - start < 5
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # for processes that are started later


def test_the_error_of_a_wrong_model_imports_no_library_that_takes_seconds():
    code = """
import sys
from trl_singlepass.cli import main
code = main(["train", "--model_name_or_path", "no-such/model"])
heavy = {"torch", "transformers", "datasets", "accelerate"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy or code != 2 else 0)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no-such/model cannot be loaded" in done.stderr


@pytest.mark.usefixtures("endpoint")
def test_the_hub_is_asked_once(monkeypatch):
    asked = []

    def ask():
        asked.append(True)
        raise OSError

    monkeypatch.setattr("huggingface_hub.utils.get_session", ask)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be loaded"):
            check_hub("no-such/model", "no-such/data")
    assert len(asked) == 1


@pytest.mark.usefixtures("endpoint")
def test_cached_models_and_local_files_are_fine(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model, file: f"/cache/{file}")
    check_hub("some/model", "some/data")
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("asked the Hub for local files"))
    check_hub(str(tmp_path), None)


def test_a_path_that_is_no_hub_id_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a folder nor the id of a model"):
        check_hub("out/demo/model", None)
