"""Import logs: read their lines, collect the bad ones, make examples, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from ...rendering.conversation import Message
from ..bad_rows import BadRows
from . import anthropic, claude_code, codex, openai_chat, openai_responses, sglang, swe_agent, vllm
from .bad_lines import BadLines, LogError
from .examples import requests_to_examples, tokens_to_examples
from .files import DOCUMENTS, LINES, find_files, read_log
from .messages import check_request
from .report import ImportReport
from .requests import Json, LoggedRequest, LoggedTokens, LogLine
from .sources import TRANSCRIPTS, LogSource


Request = LoggedRequest | LoggedTokens
Parser = Callable[[Iterable[LogLine], BadLines], Iterator[Request]]

_PARSERS: Mapping[LogSource, Parser] = {
    LogSource.OPENAI_CHAT: openai_chat.parse,
    LogSource.OPENAI_RESPONSES: openai_responses.parse,
    LogSource.ANTHROPIC: anthropic.parse,
    LogSource.CLAUDE_CODE: claude_code.parse,
    LogSource.CODEX: codex.parse,
    LogSource.SWE_AGENT: swe_agent.parse,
    LogSource.VLLM: vllm.parse,
    LogSource.SGLANG: sglang.parse,
}


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
    parse = partial(claude_code.parse, skip_attachments=True) if skip_attachments else _PARSERS[source]
    requests, checked = [], dict[int, Message]()
    for request in parse(chain.from_iterable(read_log(path, bad) for path in files), bad):
        try:
            requests.append(_complete(request, system_prompt, tools, checked))
        except LogError as error:
            bad.add(request.place, str(error))
    if len(bad) and bad_lines == BadRows.ERROR:
        raise bad.error()
    if not requests:
        reasons = "".join(f"\n- {reason}" for reason in bad.group())
        raise LogError(f"There is no {source} request with a reply in {', '.join(names)}.{reasons}")
    turns = [request for request in requests if isinstance(request, LoggedTokens)]
    messages = [request for request in requests if isinstance(request, LoggedRequest)]
    examples = tokens_to_examples(turns) if turns else requests_to_examples(messages)
    return examples.rows, ImportReport.from_import(len(files), requests, examples, bad)


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
    """
    Return the tools of a JSON file: a list of JSON schemas, as for `apply_chat_template`.

    Raises `ValueError` if the file holds something else.
    """
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
