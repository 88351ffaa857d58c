"""Import logs: find their format, read their lines, collect the bad ones, make examples, report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

from huggingface_hub.utils import tqdm

from ...rendering.conversation import Message
from ..bad_rows import BadRows, count_of
from . import (
    TOKENS,
    LogSource,
    anthropic,
    claude_code,
    codex,
    langfuse,
    openai_chat,
    openai_responses,
    opentelemetry,
    swe_agent,
)
from .examples import MessageExamples, TokenExamples
from .files import DOCUMENTS, LINES, TRAJECTORIES, find_files, read_log
from .lines import (
    BadLines,
    Json,
    LogError,
    LoggedRequest,
    LoggedTokens,
    LogLine,
    check_request,
    read_parts,
)


Request = LoggedRequest | LoggedTokens
Examples = MessageExamples | TokenExamples
Reader = Callable[[Iterable[LogLine], BadLines], Iterator[Request]]

_READERS: Mapping[LogSource, Reader] = {
    LogSource.OPENAI_CHAT: partial(read_parts, read=openai_chat.read_line),
    LogSource.OPENAI_RESPONSES: openai_responses.read_lines,
    LogSource.ANTHROPIC: partial(read_parts, read=anthropic.read_line),
    LogSource.LANGFUSE: partial(read_parts, read=langfuse.read_observation, find_parts=langfuse.find_observations),
    LogSource.OPENROUTER: partial(read_parts, read=opentelemetry.read_trace),
    LogSource.OPENTELEMETRY: partial(
        read_parts, read=opentelemetry.read_record, find_parts=opentelemetry.find_records
    ),
    LogSource.CLAUDE_CODE: claude_code.read_lines,
    LogSource.CODEX: codex.read_lines,
    LogSource.SWE_AGENT: swe_agent.read_lines,
    LogSource.VLLM: partial(read_parts, read=openai_chat.read_vllm_line),
    LogSource.SGLANG: partial(read_parts, read=openai_chat.read_sglang_line),
}
# What is searched for in a folder.
_SUFFIXES: Mapping[LogSource, Sequence[Sequence[str]]] = {
    LogSource.AUTO: (LINES, TRAJECTORIES, DOCUMENTS),
    LogSource.CLAUDE_CODE: (LINES,),
    LogSource.CODEX: (LINES,),
    LogSource.SWE_AGENT: (TRAJECTORIES,),
}
_LINES_READ = 100  # to find a format
_CODEX = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")
# By what lines are recognised that are no exchange.
_MARKS: Mapping[LogSource, Callable[[Json], object]] = {
    LogSource.CLAUDE_CODE: lambda entry: "uuid" in entry and "parentUuid" in entry,
    LogSource.CODEX: lambda entry: "payload" in entry and entry.get("type") in _CODEX,
    LogSource.SWE_AGENT: lambda entry: any(key in entry for key in ("trajectory", "attempts", "replay_config")),
    LogSource.OPENTELEMETRY: opentelemetry.find_records,
    LogSource.OPENROUTER: opentelemetry.is_trace,
    LogSource.LANGFUSE: langfuse.is_observation,
}
# What is counted of requests.
_FACTS: Mapping[str, Callable[[LoggedRequest], bool]] = {
    "reasoning": lambda request: "reasoning_content" in request.reply,
    "hidden reasoning": lambda request: request.has_hidden_reasoning,
    "subagent": lambda request: request.is_subagent,
    "compaction": lambda request: request.follows_compaction,
    "skipped attachments": lambda request: request.has_skipped_attachments,
    "no system prompt": lambda request: request.context[0]["role"] not in ("system", "developer"),
    "no tools": lambda request: (
        not request.tools and any("tool_calls" in message for message in (*request.context, request.reply))
    ),
}


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Counts of what an import read, wrote and left out; as text, a few lines."""

    detected: LogSource | None  # format, where it had to be found
    num_files: int
    requests: Counter[str]  # all that have a reply, as `all`, and what `_FACTS` says about them
    num_duplicates: int  # requests that stand in the log twice, and are trained once
    forms: Counter[str]  # examples by form: `messages`, `prompt + completion`, `requests`, `tokens`
    num_turns: int  # replies that the examples train
    bad_lines: tuple[str, ...]  # why lines were left out, with their numbers
    num_bad_lines: int
    flags: tuple[str, ...]  # which would give requests what they lack

    def __str__(self) -> str:
        requests, hidden = count_of(self.requests["all"], "request"), self.requests["hidden reasoning"]
        repeated = f", {count_of(self.num_duplicates, 'repetition')} among them" if self.num_duplicates else ""
        forms = ", ".join(f"{number} as {form}" for form, number in sorted(self.forms.items()))
        lines = [
            *([f"Format: {self.detected}"] if self.detected else []),
            f"{requests} in {count_of(self.num_files, 'file')}{repeated}",
            f"{count_of(self.forms.total(), 'example')} ({forms}) with {count_of(self.num_turns, 'turn')}",
        ]
        if self.requests["reasoning"] or hidden:
            lines.append(f"Reasoning: {self.requests['reasoning']} of {requests}")
        if hidden:
            lines[-1] += f"; of {hidden} more the log holds it only in encrypted form"
        lines += self._describe("By subagents", "subagent")
        lines += self._describe("After a compaction", "compaction")
        lines += self._describe("Without their attachments", "skipped attachments")
        lines += self._describe("Without a system prompt", "no system prompt", "--system_prompt")
        lines += self._describe("With tool calls but no tools", "no tools", "--tools")
        if self.num_bad_lines:
            lines.append(f"Left out: {count_of(self.num_bad_lines, 'bad line')}")
            lines += [f"- {reason}" for reason in self.bad_lines]
        return "\n".join(lines)

    def _describe(self, what: str, fact: str, flag: str | None = None) -> list[str]:
        number = self.requests[fact]
        way_out = f" ({flag} FILE adds what is missing)" if flag in self.flags else ""
        return [f"{what}: {count_of(number, 'request')}{way_out}"] if number else []


def import_logs(
    source: LogSource,
    names: Sequence[str],
    *,
    bad_lines: BadRows = BadRows.ERROR,
    system_prompt: str | None = None,
    tools: list[Json] | None = None,
    skip_attachments: bool = False,
) -> tuple[Examples, ImportReport]:
    """
    Turn logs (files, or folders of files) into examples of a dataset, and tell what was read and left out.

    `system_prompt` and `tools` are for requests that have none. Raises `ValueError` if a file does not exist, a line
    is bad and may not be left out, nothing can be trained, or a setting does not go with the format.
    """
    files, bad = find_files(names, _SUFFIXES.get(source, (LINES, DOCUMENTS))), BadLines()
    detected = _detect_source(files) if source == LogSource.AUTO else None
    source = detected or source
    flags = [flag for flag, value in (("--system_prompt", system_prompt), ("--tools", tools)) if value is None]
    if source in TOKENS and len(flags) < 2:
        raise ValueError(f"--system_prompt and --tools are for messages; {source} logs hold the tokens of a prompt.")
    if skip_attachments and source != LogSource.CLAUDE_CODE:
        raise ValueError(f"--skip_attachments is for {LogSource.CLAUDE_CODE}; {source} logs have no attachments.")
    read = partial(claude_code.read_lines, skip_attachments=True) if skip_attachments else _READERS[source]
    messages, tokens = MessageExamples(), TokenExamples()
    counts: Counter[str] = Counter()
    checked: dict[int, Message] = {}
    lines = chain.from_iterable(read_log(path, bad) for path in tqdm(files, desc="Reading", unit=" files"))
    for request in tqdm(read(lines, bad), desc="Importing", unit=" requests"):
        with bad.at(request.place):
            if isinstance(request, LoggedTokens):
                tokens.add(request)
            else:
                request = _complete(request, system_prompt, tools)
                checked = check_request(request, checked)
                messages.add(request)
                counts.update(fact for fact, holds in _FACTS.items() if holds(request))
            counts["all"] += 1
    if len(bad) and bad_lines == BadRows.ERROR:
        raise bad.error()
    if not counts["all"]:
        reasons = "".join(f"\n- {reason}" for reason in bad.group())
        raise LogError(f"There is no {source} request with a reply in {', '.join(names)}.{reasons}")
    examples: Examples = tokens if source in TOKENS else messages
    return examples, ImportReport(
        detected=detected,
        num_files=len(files),
        requests=counts,
        num_duplicates=examples.num_duplicates,
        forms=examples.forms,
        num_turns=examples.num_turns,
        bad_lines=tuple(bad.group()),
        num_bad_lines=len(bad),
        flags=tuple(flags),
    )


def _complete(request: LoggedRequest, system_prompt: str | None, tools: list[Json] | None) -> LoggedRequest:
    """Return a request with what it lacks, but for those that lack something else."""
    if not request.is_completed:
        return request
    if system_prompt is not None and request.context[:1] and request.context[0]["role"] != "system":
        system: Message = {"role": "system", "content": system_prompt}
        request = replace(request, context=[system, *request.context])
    return request if tools is None or request.tools else replace(request, tools=tools)


def read_tools(path: Path) -> list[Json]:
    """Return the tools of a JSON file: a list of JSON schemas, as for `apply_chat_template`."""
    try:
        tools = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Expected a list of tools.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{path} is not a list of tools. Expected JSON schemas, as for apply_chat_template.")
    return tools


def write_examples(examples: Examples, path: Path) -> None:
    """Write examples as JSON Lines, each with the columns of all: `Dataset.from_list` looks at the first row alone."""
    columns = dict.fromkeys(examples.columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({**columns, **row}, ensure_ascii=False) + "\n" for row in examples)


# Which format a log is written in, by the keys of its first lines ----------------------------------------------------


def _detect_source(files: Iterable[Path]) -> LogSource:
    """Return the format of log files; several, or none that is known, raise `ValueError`."""
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
    try:
        for source, holds in _MARKS.items():
            if holds(line.entry):
                return source
        request, response = line.get_exchange(lambda events: {**events[0], "object": None})
    except LogError:
        return None
    kind = str(response.get("type"))
    if "meta_info" in response:
        return LogSource.SGLANG
    if "choices" in response:
        has_tokens = request.get("return_token_ids") or response.get("prompt_token_ids")
        return LogSource.VLLM if has_tokens else LogSource.OPENAI_CHAT
    if "output" in response or kind.startswith("response."):
        return LogSource.OPENAI_RESPONSES
    return LogSource.ANTHROPIC if "stop_reason" in response or kind == "message_start" else None
