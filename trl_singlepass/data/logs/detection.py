"""Which format a log is written in, by the keys of its first lines."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from . import LogSource
from .files import read_log
from .langfuse import is_observation
from .lines import BadLines, Json, LogError, LogLine, get_exchange
from .openrouter import is_trace
from .opentelemetry import find_records


_LINES_READ = 100
_CODEX = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")


def detect_source(files: Iterable[Path]) -> LogSource:
    """
    Return the format of log files.

    Raises `ValueError` if they have several, or none that is known.
    """
    found: dict[LogSource, Path] = {}
    for path in files:
        lines = islice(read_log(path, BadLines()), _LINES_READ)
        source = next(filter(None, map(_recognise, lines)), None)
        if source is not None:
            found.setdefault(source, path)
    if len(found) > 1:
        kinds = ", ".join(f"{source} ({path})" for source, path in found.items())
        raise ValueError(f"The files have several formats: {kinds}. Import those of each format by themselves.")
    if not found:
        sources = ", ".join(source for source in LogSource if source != LogSource.AUTO)
        raise ValueError(f"The format of the log is not recognised. Name it in the place of 'auto': {sources}.")
    return next(iter(found))


def _recognise(line: LogLine) -> LogSource | None:
    """Return the format of a line; `None` if it could be of several, or of none."""
    entry = line.entry
    if "uuid" in entry and "parentUuid" in entry:
        return LogSource.CLAUDE_CODE
    if "payload" in entry and entry.get("type") in _CODEX:
        return LogSource.CODEX
    if any(key in entry for key in ("trajectory", "attempts", "replay_config")):
        return LogSource.SWE_AGENT
    try:
        if find_records(entry):
            return LogSource.OPENTELEMETRY
        if is_trace(entry):
            return LogSource.OPENROUTER
        if is_observation(entry):
            return LogSource.LANGFUSE
        request, response = get_exchange(line, lambda events: {**events[0], "object": None})
    except LogError:
        return None
    return _recognise_response(request, response)


def _recognise_response(request: Json, response: Json) -> LogSource | None:
    kind = str(response.get("type"))
    if "meta_info" in response:
        return LogSource.SGLANG
    if "choices" in response:
        has_tokens = request.get("return_token_ids") or response.get("prompt_token_ids")
        return LogSource.VLLM if has_tokens else LogSource.OPENAI_CHAT
    if "output" in response or kind.startswith("response."):
        return LogSource.OPENAI_RESPONSES
    return LogSource.ANTHROPIC if "stop_reason" in response or kind == "message_start" else None
