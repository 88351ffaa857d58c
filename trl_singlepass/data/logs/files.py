"""
The JSON objects of log files, one at a time: a log may be larger than memory.

A file has an object per line, or one object or an array of objects over many lines; it may be compressed (`.gz`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast
from weakref import finalize

from ...rendering.validation import describe_type
from .lines import BadLines, LogLine, Place


LINES = (".jsonl", ".ndjson")
DOCUMENTS = (".json",)
TRAJECTORIES = (".traj",)
_PIECE = 1 << 20
# An error this near to the end of a piece may come from where it was cut, as in `tru` or `\u00f`.
_CUT = 16
# What stands between values; brackets are arrays around them.
_BETWEEN = " \t\r\n,[]"


def find_files(names: Sequence[str], suffixes: Sequence[Sequence[str]]) -> list[Path]:
    """Return the files that were named, and of folders those with the first group of suffixes that they have."""
    files: list[Path] = []
    for path in (Path(name).expanduser() for name in names):
        paths = sorted(path.rglob("*"))
        groups = ([inner for inner in paths if _get_suffix(inner) in group] for group in suffixes)
        found = [path] if path.is_file() else next(filter(None, groups), [])
        if not found:
            known = " or ".join(suffix for group in suffixes for suffix in group)
            what = f"The folder {path} has no {known} files" if path.is_dir() else f"There is no {path}"
            raise ValueError(f"{what}. Give files, or folders that hold them.")
        files += found
    return files


def _get_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def read_log(path: Path, bad_lines: BadLines) -> Iterator[LogLine]:
    """Yield the JSON objects of a file; `bad_lines` takes what is none."""
    number = 0
    try:
        is_document = _is_document(path)
        with _open(path) as file:
            lines = ((number, _parse(text)) for number, text in enumerate(file, start=1) if text.strip())
            for number, value in _read_document(file) if is_document else lines:
                place = Place(str(path), number)
                if isinstance(value, dict):
                    yield LogLine(place, value)
                elif isinstance(value, ValueError):
                    bad_lines.add(place, f"The line is not JSON ({value}).")
                else:
                    bad_lines.add(place, f"The line is {describe_type(value)}, expected a JSON object.")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        bad_lines.add(Place(str(path), number + 1), f"The file cannot be read from here on ({error}).")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _is_document(path: Path) -> bool:
    """Return whether a file is an array, or an object that goes on after its first line."""
    with _open(path) as file:
        lines = (line.removeprefix(BOM_UTF8).strip() for line in iter(lambda: file.readline(_PIECE), b""))
        first = next(filter(None, lines), b"{}")
    is_broken = _get_suffix(path) in DOCUMENTS and isinstance(_parse(first), ValueError)
    return is_broken or first.startswith(b"[") or first == b"{" or _get_suffix(path) in TRAJECTORIES


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("it is nested too deeply to be read")
    except ValueError as error:
        return error


def _read_document(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yield values, those of arrays one by one, each with its number; pieces grow until they hold the next value."""
    decode, parse = getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder().raw_decode
    text, start, number, size, depth, at_end = "", 0, 0, _PIECE, 0, False
    while True:
        while start < len(text) and text[start] in _BETWEEN:
            depth += {"[": 1, "]": -1}.get(text[start], 0)
            start += 1
        value: Any
        try:
            value, end = parse(text, start)
            is_cut = end == len(text)  # a number may go on
        except json.JSONDecodeError as error:
            value, end = error, start
            is_cut = error.msg.startswith("Unterminated") or error.pos + _CUT > len(text)
        except RecursionError:
            value, end, is_cut = json.JSONDecodeError("it is nested too deeply to be read", "", 0), start, False
        if is_cut and not at_end:
            piece = file.read(size)
            text, start, size, at_end = text[start:] + decode(piece, not piece), 0, 2 * size, not piece
            continue
        if start == len(text) and depth == 0:
            return
        number, start, size = number + 1, end, _PIECE
        yield number, value
        if isinstance(value, json.JSONDecodeError):
            return


class Spool:
    """Lines of JSON that are kept in a temporary file, and not in memory."""

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115
        finalize(self, self._file.close)
        self._size = 0

    def add(self, line: bytes) -> int:
        """Keep a line, as [`dump`] makes it, and return its place."""
        place = self._size
        self._file.seek(place)
        self._size += self._file.write(line)
        return place

    def read(self, place: int) -> Any:
        """Return the value of the line at a place."""
        self._file.seek(place)
        return json.loads(self._file.readline())


def dump(value: object) -> bytes:
    """Return a value as a line of JSON; keys are not sorted, since templates print schemas as they are given."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
