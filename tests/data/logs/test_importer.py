"""The command: which files it reads, what it reports, what it refuses."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from support.conversations import TOOLS
from support.logs import assistant, get_error, import_entries, take_apart, user
from support.small_repository import ROOT
from trl_singlepass.cli.demo import LOGS
from trl_singlepass.cli.main import main
from trl_singlepass.data.bad_rows import BadRows


def entry(question, reply, reason="stop"):
    choice = {"message": assistant(reply), "finish_reason": reason}
    return {"request": {"messages": [user(question)]}, "response": {"choices": [choice]}}


def write(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in entries), "utf-8")


def run(capsys, *arguments):
    code = main(["import", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_folders_are_searched_for_files(tmp_path, capsys):
    write(tmp_path / "b.jsonl", entry("2", "two"))
    write(tmp_path / "a" / "a.jsonl", entry("1", "one"))
    write(tmp_path / "a" / "other.json", {})
    output = tmp_path / "out" / "data.jsonl"
    code, out, _ = run(capsys, "openai-chat", tmp_path, "-o", output)
    assert code == 0
    assert out.startswith("2 requests in 2 files\n2 examples (2 as messages) with 2 turns\n")
    assert [json.loads(line)["messages"][1]["content"] for line in output.read_text().splitlines()] == ["one", "two"]


def test_bad_lines_are_named_together_by_reason(tmp_path):
    lines = [entry(str(k), "so", "length" if k % 2 else "stop") for k in range(30)]
    error = get_error(tmp_path, "openai-chat", [*lines, entry("", None)])
    assert error == (
        "16 lines of the log cannot be trained as they were sent; --bad_lines drop leaves out such lines and counts "
        "them:\n"
        "- 15 lines (log:2, 4, 6, 8, 10, 12, 14, 16, 18, 20 and 5 more), the first: The reply did not end: its "
        "finish_reason is 'length', expected 'stop' or 'tool_calls'.\n"
        "- log:31: The reply has neither text nor tool calls: the model stopped while it was reasoning."
    )


def test_bad_lines_can_be_left_out_and_are_counted(tmp_path):
    lines = [entry("1", "one"), entry("2", "tw", "length")]
    rows, report = import_entries(tmp_path, "openai-chat", lines, bad_lines=BadRows.DROP)
    assert rows == [{"messages": [user("1"), assistant("one")]}]
    assert (report.requests["all"], report.num_bad_lines) == (1, 1)
    assert "Left out: 1 bad line\n- " in str(report)


def test_text_that_is_not_json_is_a_bad_line(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(entry("1", "one")) + "\n\n{broken\n[]\n", "utf-8")
    code, _, err = run(capsys, "openai-chat", log, "-o", tmp_path / "data.jsonl")
    assert code == 2
    assert f"{log}:3: The line is not JSON" in err
    assert f"{log}:4: The line is a list, expected a JSON object." in err
    assert not (tmp_path / "data.jsonl").exists()


def test_requests_that_stand_in_the_log_twice_are_counted(tmp_path):
    report = import_entries(tmp_path, "openai-chat", [entry("1", "one"), entry("1", "one")])[1]
    assert str(report) == (
        "2 requests in 1 file, 1 repetition among them\n"
        "1 example (1 as messages) with 1 turn\n"
        "Without a system prompt: 2 requests (--system_prompt FILE adds what is missing)"
    )


def test_system_prompt_and_tools_of_a_transcript_come_from_files(tmp_path, capsys):
    (tmp_path / "system.md").write_text("Be careful.", "utf-8")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS), "utf-8")
    files = ["--system_prompt", tmp_path / "system.md", "--tools", tmp_path / "tools.json"]
    code, out, _ = run(capsys, "claude-code", LOGS / "claude_code.jsonl", "-o", tmp_path / "data.jsonl", *files)
    assert code == 0
    assert "Without a system prompt" not in out
    assert "no tools" not in out
    examples = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text("utf-8").splitlines()]
    requests = [request for example in examples for request in take_apart(example)]
    assert requests[0]["messages"][0] == {"role": "system", "content": "Be careful."}
    assert requests[0]["tools"] == TOOLS


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["openai-chat", "none.jsonl", "-o", "x"], "There is no none.jsonl"),
        (["openai-chat", "empty", "-o", "x"], "empty has no .jsonl or .ndjson or .json files"),
        (["openai-chat", "nothing.jsonl", "-o", "x"], "There is no openai-chat request with a reply in nothing.jsonl"),
        (["openai-chat", "log.jsonl"], "the following arguments are required: -o/--output"),
        (["openai", "log.jsonl", "-o", "x"], "invalid choice: 'openai'"),
        (["openai-chat", "log.jsonl", "-o", "x", "--tools", "log.jsonl"], "log.jsonl is not a list of tools"),
        (["openai-chat", "log.jsonl", "-o", "x", "--tools", "none"], "There is no file none"),
        (["vllm", "log.jsonl", "-o", "x", "--tools", "t.json"], "--tools are for messages"),
        (["auto", "nothing.jsonl", "-o", "x"], "The format of the log is not recognised"),
        (["codex", "log.jsonl", "-o", "x", "--skip_attachments"], "--skip_attachments is for claude-code"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "nothing.jsonl")
    write(tmp_path / "log.jsonl", entry("1", "one"))
    (tmp_path / "t.json").write_text("[]")
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("trl-singlepass import: ")
    assert reason in err
    assert err.count("\n") == 1


def test_flags_that_would_complete_requests_are_named_until_they_are_given(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    reply = {"choices": [{"message": assistant(None, tool_calls=[call]), "finish_reason": "tool_calls"}]}
    lines = [{"request": {"messages": [user("1")]}, "response": reply}]
    report = str(import_entries(tmp_path, "openai-chat", lines)[1])
    assert "--system_prompt" in report
    assert "--tools" in report
    rows, report = import_entries(tmp_path, "openai-chat", lines, system_prompt="Be brief.", tools=TOOLS)
    assert "--" not in str(report)
    assert rows[0]["tools"] == TOOLS
    assert rows[0]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_an_import_loads_no_torch(tmp_path):
    arguments = ["import", "claude-code", str(LOGS / "claude_code.jsonl"), "-o", str(tmp_path / "data.jsonl")]
    code = (
        "import sys; from trl_singlepass.cli.main import main; "
        f"assert main({arguments}) == 0; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_page_shows_the_report_of_its_first_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "datasets.md").read_text("utf-8")
    commands, report = re.search(r"```bash\n(.*?)\n```\n\n```text\n(.*?)```", page, re.S).groups()
    assert [main(shlex.split(command)[1:]) for command in commands.splitlines()] == [0, 0]
    assert capsys.readouterr().out.partition("\n")[2] == report
