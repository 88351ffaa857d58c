"""Arguments from the command line and from YAML."""

import json
import os

import pytest

from trl_singlepass.cli.arguments import ADD_ARGUMENTS, CommandParser, peek


def parse_audit(*arguments):
    parser = CommandParser()
    ADD_ARGUMENTS["audit"](parser)
    return parser.parse(arguments)


def test_flags_win_over_the_config_file(run, model, data, tmp_path):
    (tmp_path / "c.yaml").write_text("sample_size: 3\nseed: 1\n")
    _, out, _ = run("audit", model, data, "--config", tmp_path / "c.yaml", "--json", "-")
    assert json.loads(out)["num_audited"] == 3
    _, out, _ = run(
        "audit", model, data, "--config", tmp_path / "c.yaml", "--sample_size", 2, "--num_proc", 2, "--json", "-"
    )
    assert json.loads(out)["num_audited"] == 2


def test_environment_of_the_config_file(tmp_path, monkeypatch):
    monkeypatch.delenv("FROM_THE_CONFIG", raising=False)
    (tmp_path / "c.yaml").write_text("env: {FROM_THE_CONFIG: 3}\nmodel: m\ndata: d\nseed: 1\n")
    args = parse_audit("--config", str(tmp_path / "c.yaml"))
    assert (args.model, args.data, args.seed) == ("m", "d", 1)
    assert os.environ.pop("FROM_THE_CONFIG") == "3"


@pytest.mark.parametrize(
    ("given", "expected"), [([], False), (["--debug"], True), (["--debug", "true"], True), (["--debug", "no"], False)]
)
def test_flags_may_have_a_value(given, expected):
    assert parse_audit("m", "d", *given).debug is parse_audit(*given, "m", "d").debug is expected


@pytest.mark.parametrize("value", ["many", "1.5"])
def test_values_of_the_config_file_are_checked(tmp_path, value):
    (tmp_path / "c.yaml").write_text(f"seed: {value}\n")
    with pytest.raises(ValueError, match="argument --seed"):
        parse_audit("m", "d", "--config", str(tmp_path / "c.yaml"))


def test_a_config_file_may_stand_after_an_equals_sign_and_serves_every_command(run, tmp_path):
    (tmp_path / "c.yaml").write_text("name: cpu-smoke\ndebug: false\n")
    assert run("recipes", f"--config={tmp_path / 'c.yaml'}") == run("recipes", "cpu-smoke")


def test_peek_reads_flags_then_the_config_file(tmp_path):
    (tmp_path / "c.yaml").write_text("model_name_or_path: from the file\ndataset_name: d\n")
    arguments = ["--config", str(tmp_path / "c.yaml"), "--model_name_or_path", "from the flag", "--other", "3"]
    assert peek(arguments) == ("from the flag", "d")
    assert peek(["--model-name-or-path", "m"]) == ("m", None)
