"""The lines of log files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ...rendering.validation import describe_type
from .bad_lines import BadLines, Place
from .requests import LogLine


LINES = (".jsonl", ".ndjson")
# One JSON object in each.
DOCUMENTS = (".traj",)


def find_files(names: Sequence[str], suffixes: Sequence[str] = LINES) -> list[Path]:
    """
    Return the files that were named, and from folders those with `suffixes`, in alphabetical order.

    Raises `ValueError` if there is no such file, or a folder has none.
    """
    files: list[Path] = []
    for path in (Path(name).expanduser() for name in names):
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in suffixes)
        if not found:
            what = (
                f"The folder {path} has no {' or '.join(suffixes)} files" if path.is_dir() else f"There is no {path}"
            )
            raise ValueError(f"{what}. Give files, or folders that hold them.")
        files += found
    return files


def read_log(path: Path, bad_lines: BadLines) -> Iterator[LogLine]:
    """
    Yield the JSON objects of a file, which has one per line or is one of `DOCUMENTS`.

    `bad_lines` takes the lines that are no JSON objects; empty ones are left out.
    """
    if path.suffix in DOCUMENTS:
        texts: Iterable[bytes] = [path.read_bytes()]
    else:
        texts = _read_lines(path)
    for number, text in enumerate(texts, start=1):
        place = Place(str(path), number)
        if not text.strip():
            continue
        try:
            entry = json.loads(text)
        except ValueError as error:
            bad_lines.add(place, f"The line is not JSON ({error}).")
            continue
        if isinstance(entry, dict):
            yield LogLine(place, entry)
        else:
            bad_lines.add(place, f"The line is {describe_type(entry)}, expected a JSON object.")


def _read_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file
