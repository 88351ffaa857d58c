"""Short logs, and what an import makes of them."""

import json

import pytest

from trl_singlepass.data.logs import LogSource
from trl_singlepass.data.logs.importer import import_logs
from trl_singlepass.data.logs.lines import LogError
from trl_singlepass.data.requests import split_requests


def import_entries(folder, source, entries, **options):
    """Import a log with one entry per line; return each request as an example of its own, and the report."""
    examples, report = import_whole(folder, source, entries, **options)
    return [request for example in examples for request in take_apart(example)], report


def import_whole(folder, source, entries, **options):
    """Import a log with one entry per line; return the examples and the report."""
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return import_files(source, path, **options)


def import_files(source, *paths, **options):
    """Import files; return the examples and the report."""
    examples, report = import_logs(LogSource(source), list(map(str, paths)), **options)
    return list(examples), report


def take_apart(example):
    """Return the requests of an example as examples; where no model has spoken in the prompt, as `messages`."""
    parts = []
    for request in split_requests(example) or [example]:
        whole = [*request.get("prompt", ()), *request.get("completion", ())]
        is_whole = whole and all(message["role"] != "assistant" for message in request["prompt"])
        rest = {key: value for key, value in request.items() if key not in ("prompt", "completion")}
        parts.append({"messages": whole, **rest} if is_whole else request)
    return parts


def get_error(folder, source, entries, **options):
    """Return the error that names the bad lines of a log, with `log` for the file."""
    with pytest.raises(LogError) as raised:
        import_entries(folder, source, entries, **options)
    return str(raised.value).replace(str(folder / "log.jsonl"), "log")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}
