"""The command: each of its commands on a tiny model and a small file, and each error in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS, chat, tool_chat
from support.trainers import float32_model
from trl_singlepass.cli import commands, launch
from trl_singlepass.cli.main import EXAMPLES, SUMMARIES, _parser_class, main
from trl_singlepass.data.files import JsonLines, load_examples
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.scripts import sft
from trl_singlepass.training.checkpoints import checkpoint_to_resume


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def rows():
    called = tool_chat()
    as_text = json.loads(json.dumps(called))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1, "b": 2}'
    return [
        {"messages": chat(3)},
        {"messages": chat(2, 1)},
        {"messages": called, "tools": TOOLS},
        {"messages": as_text, "tools": TOOLS},
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    float32_model(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows()) + "\n")
    return str(path)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_help_names_every_command(run):
    for arguments in ([], ["--help"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert all(name in out for name in SUMMARIES)


@pytest.mark.parametrize("name", SUMMARIES)
def test_help_of_each_command_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"trl-singlepass {name} " in capsys.readouterr().out.split("example:")[1]


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "train"])
def test_examples_parse(name):
    dataclass = getattr(commands, f"{name.capitalize()}Arguments")
    parser = _parser_class()([dataclass])
    parser.add_argument("model")
    parser.add_argument("data")
    _, named = parser.parse_args_and_config(EXAMPLES[name].split()[2:])
    assert (named.model, named.data) == ("Qwen/Qwen3-0.6B", "data.jsonl")


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
    assert "Auditing conversations" in err or "Reading" in err or err == ""  # progress bars may be disabled
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["num_rows"] == 4
    assert report["forecast"]["has_model"]
    page = (tmp_path / "a.html").read_text()
    assert all(word in page for word in ("Findings", "Tokens per sample", "N-pass of maximal chains"))
    code, out, _ = run("audit", model, data, "--json", "-", "--sample_size", 2)
    assert json.loads(out)["num_audited"] == 2


def test_verify_tells_agreement(run, model, data):
    code, out, err = run("verify", model, data, "-n", 3)
    assert code == 0, err
    assert "equals N-pass" in out
    assert {line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│   ")} >= {"0", "1", "2"}


def test_verify_exits_with_1_on_disagreement(run, model, data, monkeypatch):
    from trl_singlepass.reference import single_pass

    original = single_pass._make_batch

    def moved(tree, device):
        batch = original(tree, device)
        batch["position_ids"] = batch["position_ids"] + (batch["position_ids"] > 9)
        return batch

    monkeypatch.setattr(single_pass, "_make_batch", moved)
    code, out, _ = run("verify", model, data, "-n", 1)
    assert code == 1
    assert "does NOT equal" in out


def test_bench_times_both_with_the_forecast_beside(run, model, data):
    code, out, err = run("bench", model, data, "-n", 2, "--repeats", 1)
    assert code == 0, err
    assert "seconds, measured" in out
    assert "TFLOP, counted" in out
    assert "2 conversations, 5 turns" in out


def test_flags_win_over_the_config_file(run, model, data, tmp_path):
    (tmp_path / "c.yaml").write_text("sample_size: 3\nseed: 1\n")
    _, out, _ = run("audit", model, data, "--config", tmp_path / "c.yaml", "--json", "-")
    assert json.loads(out)["num_audited"] == 3
    _, out, _ = run(
        "audit", model, data, "--config", tmp_path / "c.yaml", "--sample_size", 2, "--num_proc", 2, "--json", "-"
    )
    assert json.loads(out)["num_audited"] == 2


def test_a_chat_template_file_takes_the_place_of_the_tokenizers(run, model, data, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ bad_function() }}")
    _, out, _ = run("audit", model, data, "--chat_template", tmp_path / "t.jinja")
    assert "4 of 4 rows cannot be trained" in out


def bad_template_row():
    return {"messages": [{"role": "user", "content": "[bold]<script>alert(1)</script>"}]}


ERRORS = [
    (["frobnicate"], "There is no command 'frobnicate', only train, inspect"),
    (["inspect", "{model}"], "the following arguments are required: DATA"),
    (["inspect", "{model}", "{data}", "--frob", "1"], "not used"),
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
    (
        ["train", "--accelerate_config", "none", "--output_dir", "x", "--use_cpu", "--bf16", "false"],
        "is neither a file nor one of",
    ),
    (["train", "--learning_rate", "x"], "--learning-rate: invalid float value"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    for name, text in {"empty.jsonl": "\n", "broken.jsonl": "{nope\n", "list.jsonl": "[1]\n", "text.txt": "x"}.items():
        (folder / name).write_text(text)
    (folder / "user.jsonl").write_text(json.dumps(bad_template_row()) + "\n")
    make_tokenizer(None).save_pretrained(folder / "bare")
    return folder


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_errors_are_one_clear_line(run, model, data, broken, arguments, message):
    code, out, err = run(*(argument.format(model=model, data=data, tmp=broken) for argument in arguments))
    lines = [line for line in err.splitlines() if line.startswith("trl-singlepass")]
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


def test_debug_shows_where(model, broken):
    with pytest.raises(ValueError, match="Row 0"):
        main(["inspect", model, str(broken / "user.jsonl"), "--debug"])


def test_get_text_the_data_is_escaped_in_the_audit_page(run, model, tmp_path):
    row = {"messages": [{"role": "<script>alert(1)</script>[red]", "content": "x"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"messages": chat(1)}) + "\n")
    _, out, _ = run("audit", model, tmp_path / "x.jsonl", "--html", tmp_path / "x.html")
    assert "[red]" in "".join(part.strip("│ ") for part in out.replace("\n", ""))
    page = (tmp_path / "x.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_remote_code_is_off_unless_asked_for(monkeypatch, model, data, run):
    from trl_singlepass.cli import loading

    asked = []
    original = loading.AutoTokenizer.from_pretrained

    def remember(name, trust_remote_code):
        asked.append(trust_remote_code)
        return original(name)

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", remember)
    run("inspect", model, data)
    run("inspect", model, data, "--trust_remote_code")
    assert asked == [False, True]


# Rows ----------------------------------------------------------------------------------------------------------------


def test_json_lines_are_read_as_they_are(data):
    loaded = JsonLines(Path(data))
    assert (len(loaded), list(loaded), loaded[1:3]) == (4, rows(), rows()[1:3])


@pytest.mark.parametrize("kind", ["parquet", "folder", "split folder", "json"])
def test_other_files_and_folders(kind, tmp_path):
    plain = datasets.Dataset.from_list(rows()[:2])
    path = tmp_path / ("x." + kind if kind in ("parquet", "json") else "x")
    if kind == "parquet":
        plain.to_parquet(path)
    elif kind == "json":
        plain.to_json(path)
    elif kind == "folder":
        plain.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": plain}).save_to_disk(path)
        with pytest.raises(ValueError, match="has no split 'test', only train"):
            load_examples(str(path), split="test")
    loaded = load_examples(str(path))
    tokenizer = make_tokenizer()
    expected = [len(sample) for sample in render_example(rows()[0], tokenizer)]
    assert [len(sample) for sample in render_example(dict(loaded[0]), tokenizer)] == expected


# Training ------------------------------------------------------------------------------------------------------------

TRAIN = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]


def trained(folder):
    return (Path(folder) / "model.safetensors").is_file()


def parse(arguments):
    return sft.make_parser().parse_args_and_config([str(argument) for argument in arguments])


def test_script_trains_on_a_file_with_tool_calls_of_both_forms(model, data, tmp_path, monkeypatch):
    seen = []
    original = sft.SinglePassSFTTrainer

    def remember(**kwargs):
        seen.append(kwargs)
        return original(**kwargs)

    monkeypatch.setattr(sft, "SinglePassSFTTrainer", remember)
    arguments = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", tmp_path / "out", *TRAIN]
    sft.main(*parse([*arguments, "--dtype", "float32"]))
    assert trained(tmp_path / "out")
    tokenizer = make_tokenizer()
    for row, original_row in zip(seen[0]["train_dataset"], rows(), strict=True):
        ours, expected = render_example(row, tokenizer), render_example(original_row, tokenizer)
        assert [sample.token_ids.tolist() for sample in ours] == [sample.token_ids.tolist() for sample in expected]


class ToldToStop(TrainerCallback):
    """A scheduler's signal in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_script_saves_when_told_to_stop_and_goes_on_from_there(model, data, tmp_path, monkeypatch, capsys):
    original = sft.SinglePassSFTTrainer
    more = ["--max_steps", 4, "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 100]

    def run(output, *arguments):
        given = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output, *TRAIN, *more]
        sft.main(*parse([*given, *arguments]))

    def stopped(callbacks, **kwargs):
        return original(callbacks=[*callbacks, ToldToStop()], **kwargs)

    run(tmp_path / "whole", "--resume_from_checkpoint", "auto")  # nothing there yet
    monkeypatch.setattr(sft, "SinglePassSFTTrainer", stopped)
    run(tmp_path / "out")
    assert "--resume_from_checkpoint auto goes on" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "README.md"] == ["checkpoint-2"]
    monkeypatch.setattr(sft, "SinglePassSFTTrainer", original)
    run(tmp_path / "out", "--resume_from_checkpoint", "true")
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("false", None), ("here/checkpoint-3",) * 2])
def test_a_path_to_resume_from_is_taken_as_it_is(tmp_path, given, expected):
    assert checkpoint_to_resume(given, tmp_path) == expected


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_script_streams_a_file(data, tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(Path(data).read_bytes())
    if suffix == "parquet":
        datasets.Dataset.from_list([{"messages": chat(2)}] * 4).to_parquet(path)
    arguments = ["--dataset_name", path, "--output_dir", tmp_path, *TRAIN]
    for streaming, kind in (("true", datasets.IterableDataset), ("false", datasets.Dataset)):
        script, _, _, mixture = parse([*arguments, "--dataset_streaming", streaming])
        rows = sft._dataset(script, mixture)["train"]
        assert isinstance(rows, kind)
        assert len(list(rows)) == 4


def test_script_reads_a_config_file_and_flags_win(tmp_path):
    (tmp_path / "c.yaml").write_text("model_name_or_path: m\ndataset_name: d\nmax_length: 7\nwave_tokens: auto\n")
    script, training, model_args, _ = parse(["--config", tmp_path / "c.yaml", "--max_length", 9, *TRAIN])
    assert (script.dataset_name, model_args.model_name_or_path) == ("d", "m")
    assert (training.max_length, training.wave_tokens) == (9, "auto")


@pytest.mark.parametrize(
    ("extra", "message"),
    [([], "No data"), (["--dataset_name", "{data}", "--eval_strategy", "steps"], "no split 'test'")],
)
def test_script_names_what_is_missing(model, data, tmp_path, extra, message):
    extra = [argument.format(data=data) for argument in extra]
    with pytest.raises(ValueError, match=message):
        sft.main(*parse(["--model_name_or_path", model, "--output_dir", tmp_path, *TRAIN, *extra]))


@pytest.mark.parametrize("given", ["all", "last", "2", "sample:3"])
def test_turns_can_be_chosen_on_the_command_line(given):
    assert parse(["--train_turns", given, *TRAIN])[1].train_turns == given


def test_train_launches_the_script_through_accelerate(monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr(launch, "launch_command", launched.append)
    (tmp_path / "c.yaml").write_text("num_processes: 2\nlearning_rate: 1.0e-3\n")
    for name in ("train", "sft"):
        arguments = [name, "--config", tmp_path / "c.yaml", "--dataset_name", "d", "--accelerate_config", "fsdp2"]
        assert main([str(a) for a in [*arguments, "--main_process_port", 1234, "--output_dir", tmp_path, *TRAIN]]) == 0
    for args in launched:
        assert args.module
        assert args.training_script == launch.SCRIPT
        assert args.config_file.endswith("fsdp2.yaml")
        assert (args.num_processes, args.main_process_port) == (2, 1234)
        assert args.training_script_args[:4] == ["--config", str(tmp_path / "c.yaml"), "--dataset_name", "d"]
        assert "--main_process_port" not in args.training_script_args


PATIENT = """
import os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[-1])
rank = os.environ.get("RANK", "0")
signal.signal(signal.SIGTERM, lambda *_: (folder / f"stopped{rank}").touch())
(folder / f"ready{rank}").touch()
signal.pause()
"""


@pytest.mark.parametrize("num_processes", [1, 2])
def test_train_hands_on_that_it_should_stop_and_ends_well(tmp_path, num_processes):
    (tmp_path / "patient.py").write_text(PATIENT)
    code = "from trl_singlepass.cli import launch, main; launch.SCRIPT = 'patient'; raise SystemExit(main())"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    processes = ["--num_processes", str(num_processes), *(["--multi_gpu"] if num_processes > 1 else [])]
    command = [sys.executable, "-W", "ignore", "-c", code, "train", *processes, *TRAIN, "--output_dir", str(tmp_path)]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("ready*"))) < num_processes:
            assert run.poll() is None, run.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) == 0
    finally:
        run.kill()
        run.communicate()
    assert len(list(tmp_path.glob("stopped*"))) == num_processes


def test_accelerate_configs_are_files_or_names(tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    mine = str(tmp_path / "mine.yaml")
    assert launch.with_config_file(["--accelerate_config", mine, "--x"]) == ["--config_file", mine, "--x"]
    assert launch.with_config_file(["--x"]) == ["--x"]
    twice = ["--accelerate_config", "zero3", "--x", "--accelerate_config", mine]  # from a recipe, and as a flag
    assert launch.with_config_file(twice) == ["--config_file", mine, "--x"]
    assert Path(launch.with_config_file(["--accelerate_config", "zero3"])[1]).is_file()
    with pytest.raises(ValueError, match="needs a name or a file"):
        launch.with_config_file(["--accelerate_config"])


@pytest.mark.slow
def test_train_end_to_end(model, data, tmp_path):
    arguments = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "out"), *TRAIN]
    command = [sys.executable, "-m", "trl_singlepass.cli", "train", *arguments, "--num_processes", "1", "--cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, check=True, cwd=tmp_path)
    assert trained(tmp_path / "out")


def test_models_are_loaded_as_asked(model):
    from trl_singlepass.cli.loading import load_config, load_model

    loaded = load_model(model, dtype="float64", attn_implementation="eager", device="cpu")
    assert loaded.dtype is torch.float64
    assert loaded.config._attn_implementation == "eager"
    assert load_config(model).model_type == "qwen3"
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model("no-such/model", dtype="float32", attn_implementation=None, device="cpu")
