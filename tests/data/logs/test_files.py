"""Files of logs: in which forms their JSON comes, what is broken, and how much of it is in memory."""

import gzip
import json
import tracemalloc

import pytest

from support.logs import assistant, user
from trl_singlepass.data.logs import LogSource, files
from trl_singlepass.data.logs.files import LINES, find_files, read_log
from trl_singlepass.data.logs.importer import import_logs
from trl_singlepass.data.logs.lines import BadLines


ENTRIES = [{"a": 1, "text": "Ünïcode “,]}” \u2028"}, {"b": [[], {"c": -1.5e3}]}, {"empty": {}}]
FORMS = {
    "lines": "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in ENTRIES),
    "array": json.dumps(ENTRIES),
    "pretty array": json.dumps(ENTRIES, indent=2, ensure_ascii=False),
    "array with a byte order mark": "\ufeff" + json.dumps(ENTRIES, indent=1),
    "objects": "\n".join(json.dumps(entry, indent=2) for entry in ENTRIES),
    "arrays": "\n".join(json.dumps([entry]) for entry in ENTRIES),
}


def read(path):
    bad = BadLines()
    return [(line.place.line, line.entry) for line in read_log(path, bad)], bad.group()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz"])
@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_objects_are_read_whatever_stands_between_them(tmp_path, monkeypatch, form, suffix, piece):
    monkeypatch.setattr(files, "_PIECE", piece)
    path, data = tmp_path / f"log{suffix}", FORMS[form].encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert read(path) == (list(enumerate(ENTRIES, start=1)), [])


@pytest.mark.parametrize(
    ("text", "num_read", "reason"),
    [
        ('[{"a": 1}, {"b"', 1, "2: The line is not JSON"),
        ('[{"a": 1}', 1, "2: The line is not JSON"),
        ('[{"a": 1}, 3, {"b": 2}]', 2, "2: The line is a number, expected a JSON object"),
        ('[{"a": 1}, {b: 2}' + " " * 99 + "]", 1, "2: The line is not JSON"),
        ('[{"a": 1}, {"b": "' + "x" * 99, 1, "2: The line is not JSON"),
    ],
)
def test_what_is_broken_is_named(tmp_path, text, num_read, reason):
    path = tmp_path / "log.json"
    path.write_text(text)
    found, bad = read(path)
    assert len(found) == num_read
    assert reason in bad[0]


def test_a_compressed_file_that_breaks_off_is_named(tmp_path):
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(FORMS["lines"].encode() * 99)[:-20])
    found, bad = read(path)
    assert len(found) < 3 * 99
    assert "cannot be read from here on" in bad[0]


def test_folders_hold_lines_or_else_documents(tmp_path):
    names = ["a.json", "b.jsonl.gz", "c.jsonl", "d.txt"]
    for name in names:
        (tmp_path / name).touch()
    groups = (LINES, (".json",))
    assert [path.name for path in find_files([str(tmp_path)], groups)] == names[1:3]
    for name in names[1:]:
        (tmp_path / name).unlink()
    assert [path.name for path in find_files([str(tmp_path)], groups)] == names[:1]


@pytest.mark.parametrize("source", ["openai-chat", "openai-responses"])
@pytest.mark.parametrize("is_array", [True, False])
def test_a_log_is_not_in_memory(tmp_path, source, is_array):
    words = "word " * 20_000
    with (tmp_path / "log.json").open("w") as file:
        for number in range(200):
            file.write(("[" if number == 0 else ",") if is_array else "")
            file.write(json.dumps(exchange(source, f"{number} {words}"), indent=2 if is_array else None) + "\n")
        file.write("]" if is_array else "")
    size = (tmp_path / "log.json").stat().st_size
    tracemalloc.start()
    examples, _ = import_logs(LogSource(source), [str(tmp_path / "log.json")])
    num_examples = sum(1 for _ in examples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_examples == 200
    assert peak < size / 2


def exchange(source, text):
    if source == "openai-chat":
        choice = {"message": assistant("Yes."), "finish_reason": "stop"}
        return {"request": {"messages": [user(text)]}, "response": {"choices": [choice]}}
    output = [{"type": "message", "role": "assistant", "content": "Yes."}]
    return {"request": {"input": text}, "response": {"status": "completed", "output": output}}


@pytest.mark.parametrize("depth", [3000, 10_000])
@pytest.mark.parametrize("form", ["{}\n{}\n", "[{},{}]"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_line_that_is_nested_too_deeply_is_named(tmp_path, depth, form, as_text):
    nested = "[" * depth + "]" * depth
    if as_text:  # JSON in a string of JSON is read where its format is known
        nested = json.dumps(nested)
    path = tmp_path / ("log.json" if form[0] == "[" else "log.jsonl")
    answer = {"choices": [{"finish_reason": "stop", "message": assistant("Yes.")}]}
    good = json.dumps({"request": {"messages": [user("Hi.")]}, "response": answer})
    path.write_text(form.format(good, f'{{"request": {nested}, "response": {{}}}}'))
    with pytest.raises(ValueError, match=r"1 line of the log(.|\n)*:2"):
        import_logs(LogSource.OPENAI_CHAT, [str(path)])
