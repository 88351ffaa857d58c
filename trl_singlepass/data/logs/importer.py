"""Import logs: read their lines, collect the bad ones, make examples, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from ...rendering.conversation import Message
from ..bad_rows import BadRows
from . import (
    TRANSCRIPTS,
    LogSource,
    anthropic,
    claude_code,
    codex,
    openai_chat,
    openai_responses,
    swe_agent,
    token_ids,
)
from .examples import Examples, requests_to_examples, tokens_to_examples
from .lines import DOCUMENTS, LINES, BadLines, Json, LogError, LogLine, find_files, read_log
from .requests import LoggedRequest, LoggedTokens, check_request


Request = LoggedRequest | LoggedTokens

# Formats whose lines do not depend on each other: a line is taken whole or not at all.
_LINE_READERS: Mapping[LogSource, Callable[[LogLine], Sequence[Request]]] = {
    LogSource.OPENAI_CHAT: openai_chat.read_line,
    LogSource.ANTHROPIC: anthropic.read_line,
    LogSource.VLLM: token_ids.read_vllm_line,
    LogSource.SGLANG: token_ids.read_sglang_line,
}
_READERS: Mapping[LogSource, Callable[[Iterable[LogLine], BadLines], Iterator[Request]]] = {
    LogSource.OPENAI_RESPONSES: openai_responses.read_lines,
    LogSource.CLAUDE_CODE: claude_code.read_lines,
    LogSource.CODEX: codex.read_lines,
    LogSource.SWE_AGENT: swe_agent.read_lines,
}


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Counts of what an import read, wrote and left out; as text, a few lines."""

    num_files: int
    num_requests: int  # with a reply
    num_duplicates: int  # requests that stand in the log twice, and are trained once
    num_examples: dict[str, int]  # by form: `messages`, `prompt + completion`, `tokens`
    num_turns: int  # replies that the examples train
    num_reasoning: int  # replies with reasoning
    num_hidden_reasoning: int  # replies whose reasoning the log holds only in encrypted form
    num_with_skipped_attachments: int  # requests whose context lacks attachments
    num_without_system_prompt: int  # requests without a system prompt
    num_without_tools: int  # requests that have tool calls in them, and no tools
    num_bad_lines: int  # lines that were left out
    bad_lines: tuple[str, ...]  # why, with line numbers

    @classmethod
    def from_import(
        cls, num_files: int, requests: Sequence[Request], examples: Examples, bad_lines: BadLines
    ) -> ImportReport:
        """Count what an import read and wrote."""
        messages = [request for request in requests if isinstance(request, LoggedRequest)]
        forms = {"messages": "messages", "prompt + completion": "completion", "tokens": "prompt_ids"}
        counts = {form: sum(key in row for row in examples.rows) for form, key in forms.items()}
        return cls(
            num_files=num_files,
            num_requests=len(requests),
            num_duplicates=examples.num_duplicates,
            num_examples={form: count for form, count in counts.items() if count},
            num_turns=examples.num_turns,
            num_reasoning=sum("reasoning_content" in request.reply for request in messages),
            num_hidden_reasoning=sum(request.has_hidden_reasoning for request in messages),
            num_with_skipped_attachments=sum(request.has_skipped_attachments for request in messages),
            num_without_system_prompt=sum(
                request.context[0]["role"] not in ("system", "developer") for request in messages
            ),
            num_without_tools=sum(
                not request.tools and any("tool_calls" in message for message in (*request.context, request.reply))
                for request in messages
            ),
            num_bad_lines=len(bad_lines),
            bad_lines=tuple(bad_lines.group()),
        )

    def __str__(self) -> str:
        repeated = f", {_count(self.num_duplicates, 'repetition')} among them" if self.num_duplicates else ""
        forms = ", ".join(f"{count} as {form}" for form, count in self.num_examples.items())
        requests = _count(self.num_requests, "request")
        lines = [
            f"{requests} in {_count(self.num_files, 'file')}{repeated}",
            f"{_count(sum(self.num_examples.values()), 'example')} ({forms}) with {_count(self.num_turns, 'turn')}",
        ]
        if self.num_reasoning or self.num_hidden_reasoning:
            lines.append(f"Reasoning: {self.num_reasoning} of {requests}")
        if self.num_hidden_reasoning:
            lines[-1] += f"; of {self.num_hidden_reasoning} more the log holds it only in encrypted form"
        missing = {
            "Without their attachments": self.num_with_skipped_attachments,
            "Without a system prompt": self.num_without_system_prompt,
            "With tool calls but no tools": self.num_without_tools,
        }
        lines += [f"{what}: {_count(number, 'request')}" for what, number in missing.items() if number]
        if self.num_bad_lines:
            lines.append(f"Left out: {_count(self.num_bad_lines, 'bad line')}")
            lines += [f"- {reason}" for reason in self.bad_lines]
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def import_logs(
    source: LogSource,
    names: Sequence[str],
    *,
    bad_lines: BadRows = BadRows.ERROR,
    system_prompt: str | None = None,
    tools: list[Json] | None = None,
    skip_attachments: bool = False,
) -> tuple[list[Json], ImportReport]:
    """
    Turn logs into examples of a dataset, and tell what was read and left out.

    `names` are files, and folders of files; `bad_lines` is what happens to lines that cannot be trained as they were
    sent. `system_prompt` and `tools` are those of the requests of a transcript that has none; `skip_attachments`
    leaves attachments in transcripts of Claude Code out of contexts.

    Raises `ValueError` if a file does not exist, a line is bad and may not be left out, nothing can be trained, or a
    system prompt or tools are given for logs that hold their own.
    """
    if source not in TRANSCRIPTS and not (system_prompt is None and tools is None):
        raise ValueError(
            f"--system_prompt and --tools are for transcripts, which lack them ({', '.join(TRANSCRIPTS)}); "
            f"{source} logs hold what was sent."
        )
    if skip_attachments and source != LogSource.CLAUDE_CODE:
        raise ValueError(f"--skip_attachments is for {LogSource.CLAUDE_CODE}; {source} logs have no attachments.")
    files, bad = find_files(names, DOCUMENTS if source == LogSource.SWE_AGENT else LINES), BadLines()
    lines = chain.from_iterable(read_log(path, bad) for path in files)
    requests, checked = [], dict[int, Message]()
    for request in _read(source, lines, bad, skip_attachments):
        with bad.at(request.place):
            requests.append(_complete(request, system_prompt, tools, checked))
    if len(bad) and bad_lines == BadRows.ERROR:
        raise bad.error()
    if not requests:
        reasons = "".join(f"\n- {reason}" for reason in bad.group())
        raise LogError(f"There is no {source} request with a reply in {', '.join(names)}.{reasons}")
    turns = [request for request in requests if isinstance(request, LoggedTokens)]
    messages = [request for request in requests if isinstance(request, LoggedRequest)]
    examples = tokens_to_examples(turns) if turns else requests_to_examples(messages)
    return examples.rows, ImportReport.from_import(len(files), requests, examples, bad)


def _read(
    source: LogSource, lines: Iterable[LogLine], bad_lines: BadLines, skip_attachments: bool
) -> Iterator[Request]:
    if source in _READERS:
        read_lines = partial(claude_code.read_lines, skip_attachments=True) if skip_attachments else _READERS[source]
        yield from read_lines(lines, bad_lines)
        return
    for line in lines:
        with bad_lines.at(line.place):
            yield from _LINE_READERS[source](line)


def _complete(
    request: Request, system_prompt: str | None, tools: list[Json] | None, checked: dict[int, Message]
) -> Request:
    """Return a request that can be rendered, with what the transcript lacks."""
    if isinstance(request, LoggedTokens):
        return request
    if not request.is_side_chain:
        if system_prompt is not None and request.context[:1] and request.context[0]["role"] != "system":
            system: Message = {"role": "system", "content": system_prompt}
            request = replace(request, context=[system, *request.context])
        if tools is not None and not request.tools:
            request = replace(request, tools=tools)
    check_request(request, checked)
    return request


def read_tools(path: Path) -> list[Json]:
    """Return the tools of a JSON file: a list of JSON schemas, as for `apply_chat_template`."""
    try:
        tools = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Expected a list of tools.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{path} is not a list of tools. Expected JSON schemas, as for apply_chat_template.")
    return tools


def write_examples(rows: Sequence[Json], path: Path) -> None:
    """Write examples as JSON Lines, each with the columns of all: `Dataset.from_list` looks at the first row alone."""
    columns = dict.fromkeys(column for row in rows for column in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({**columns, **row}, ensure_ascii=False) + "\n" for row in rows)
