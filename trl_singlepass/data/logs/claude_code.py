"""
Transcripts of Claude Code (`~/.claude/projects/**/*.jsonl`).

A transcript is a tree: each line names the line before it in `parentUuid`. What the model was sent for a reply is the
path to it, where

- a reply is spread over lines that share `message.id`, one content block each; results of its tools may hang off any
  of them, so that the path alone would miss those of parallel calls;
- `compact_boundary` begins a new root: what was before it was replaced by the summary that follows;
- after `microcompact_boundary`, the results of the tools that it names were sent as [`CLEARED`];
- a side chain is a subagent's conversation, with a root of its own.

Source: the messages are those of https://docs.anthropic.com/en/api/messages; the lines around them are not documented.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...rendering.conversation import Message
from . import anthropic
from .lines import BadLines, Json, LogError, LoggedRequest, LogLine, get, get_objects, need


CLEARED = "[Old tool result content cleared]"
_INTERRUPTED = "[Request interrupted by user]"


def read_lines(
    lines: Iterable[LogLine], bad_lines: BadLines, *, skip_attachments: bool = False
) -> Iterator[LoggedRequest]:
    """
    Yield each reply of each transcript with what stood before it, or note why that is not known.

    A transcript does not hold how attachments (reminders, lists of skills, changed files) were worded for the model:
    replies after them are bad, unless `skip_attachments` leaves attachments out of contexts.
    """
    transcript = _Transcript(skip_attachments)
    for line in lines:
        with bad_lines.at(line.place):
            transcript.add(line)
    for message_id, parts in transcript.replies.items():
        with bad_lines.at(parts[0].line.place):
            yield transcript.get_request(message_id)


@dataclass(frozen=True, slots=True)
class _Node:
    """A line with a place in the tree."""

    line: LogLine
    order: int
    uuid: str
    parent: str | None
    message: Json

    @property
    def entry(self) -> Json:
        return self.line.entry

    def is_system(self, subtype: str) -> bool:
        return self.entry.get("type") == "system" and self.entry.get("subtype") == subtype


class _Transcript:
    """The lines of all transcripts; copies of a line in a session that was resumed or forked are the same line."""

    def __init__(self, skip_attachments: bool) -> None:
        self.skip_attachments = skip_attachments
        self.nodes: dict[str, _Node] = {}
        self.replies: dict[str, list[_Node]] = {}  # by `message.id`
        self.results: dict[str, list[_Node]] = {}  # by `tool_use_id`
        self.clearings: list[_Node] = []  # of tool results
        self.parents: set[str | None] = set()
        self.interrupted: set[str | None] = set()  # `uuid` of the last line before the user interrupted
        self.read: dict[str, list[Message]] = {}  # messages by `uuid` or `message.id`: all contexts share them

    def add(self, line: LogLine) -> None:
        uuid, kind = get(line.entry, "uuid", str), need(line.entry, "type", str)
        if uuid is None or uuid in self.nodes:
            return
        message = get(line.entry, "message", dict) or {}
        node = _Node(line, len(self.nodes), uuid, get(line.entry, "parentUuid", str), message)
        self.nodes[uuid] = node
        self.parents.add(node.parent)
        if node.is_system("microcompact_boundary"):
            self.clearings.append(node)
        if kind == "assistant" and message.get("model") != "<synthetic>":
            self.replies.setdefault(str(message.get("id") or uuid), []).append(node)
        if kind == "user":
            blocks = get_objects(message, "content") if isinstance(message.get("content"), list) else []
            for block in blocks:
                if block.get("type") == "tool_result":
                    self.results.setdefault(str(block.get("tool_use_id")), []).append(node)
            if _INTERRUPTED in (message.get("content"), *(block.get("text") for block in blocks)):
                self.interrupted.add(node.parent)

    def get_request(self, message_id: str) -> LoggedRequest:
        parts = self.replies[message_id]
        reasons = [reason for node in parts if (reason := node.message.get("stop_reason")) is not None]
        if any(reason not in ("end_turn", "tool_use") for reason in reasons):
            raise LogError(f"The reply did not end: its stop_reason is '{reasons[-1]}'.")
        if not reasons and any(node.uuid in self.interrupted for node in parts):
            raise LogError("The reply was interrupted.")
        reply = self.read_reply(message_id)
        path = self.get_path(parts[0])
        context = _Context(self)
        for node in path:
            context.add(node)
        return LoggedRequest(
            parts[0].line.place,
            context.messages,
            reply,
            has_hidden_reasoning=anthropic.read_assistant(self.get_blocks(message_id))[1],
            conversation=self.get_session(parts[0]),
            is_subagent=bool(parts[0].entry.get("isSidechain")),
            follows_compaction=bool(path) and path[0].is_system("compact_boundary"),
            is_completed=not parts[0].entry.get("isSidechain"),
            has_skipped_attachments=context.has_skipped_attachments,
        )

    def read_reply(self, message_id: str) -> Message:
        if message_id not in self.read:
            self.read[message_id] = [anthropic.read_assistant(self.get_blocks(message_id))[0]]
        return self.read[message_id][0]

    def read_user(self, node: _Node) -> list[Message]:
        if node.uuid not in self.read:
            self.read[node.uuid] = anthropic.read_message(node.message)
        return self.read[node.uuid]

    def get_blocks(self, message_id: str) -> list[Json]:
        return [block for node in self.replies[message_id] for block in get_objects(node.message, "content")]

    def get_path(self, reply: _Node) -> list[_Node]:
        """Return the lines before a reply, from its root."""
        path: list[_Node] = []
        node = reply
        seen = {node.uuid}
        while node.parent is not None and not node.is_system("compact_boundary"):
            if node.parent not in self.nodes or node.parent in seen:
                raise LogError(f"Its context is not in the log: there is no line '{node.parent}'.")
            node = self.nodes[node.parent]
            seen.add(node.uuid)
            path.append(node)
        for clearing in self.clearings:
            # Nothing follows it, although the conversation goes on from the line before it.
            if clearing.uuid not in self.parents and clearing.parent in seen and clearing.order < reply.order:
                raise LogError(
                    f"It is unknown whether it was sent before or after the clearing at {clearing.line.place}."
                )
        return path[::-1]

    def get_session(self, node: _Node) -> str | None:
        """Return the session that a conversation began in, before its compactions and in whichever it went on."""
        seen = {node.uuid}
        while True:
            parent = node.parent or str(node.entry.get("logicalParentUuid"))
            if parent not in self.nodes or parent in seen:
                session = node.entry.get("sessionId")
                return str(session) if session else None
            node = self.nodes[parent]
            seen.add(parent)


class _Context:
    """What was sent, line by line."""

    def __init__(self, transcript: _Transcript) -> None:
        self.transcript = transcript
        self.messages: list[Message] = []
        self.has_skipped_attachments = False
        self.needs_summary = False
        self.done: set[str] = set()

    def add(self, node: _Node) -> None:
        if node.uuid in self.done:
            return
        self.done.add(node.uuid)
        match node.entry.get("type"):
            case "user":
                self.add_user(node)
            case "assistant":
                self.add_assistant(node)
            case "attachment":
                if not self.transcript.skip_attachments:
                    raise LogError(
                        f"Its context includes an attachment (line {node.line.place.line}) whose wording is not in "
                        "the transcript; --skip_attachments leaves attachments out."
                    )
                self.has_skipped_attachments = True
            case "system":
                self.add_system(node)

    def add_user(self, node: _Node) -> None:
        is_summary = bool(node.entry.get("isCompactSummary"))
        if node.entry.get("isVirtual") or (node.entry.get("isVisibleInTranscriptOnly") and not is_summary):
            return  # shown to the user, never sent
        if self.needs_summary and not is_summary:
            raise LogError("Its context was compacted, and the summary that replaced it is not in the log.")
        self.needs_summary = False
        self.messages += self.transcript.read_user(node)

    def add_assistant(self, node: _Node) -> None:
        if node.message.get("model") == "<synthetic>":
            if node.entry.get("isApiErrorMessage"):
                return  # shown to the user, never sent
            raise LogError("Its context includes a message that Claude Code wrote in the model's place.")
        message_id = str(node.message.get("id") or node.uuid)
        self.done |= {part.uuid for part in self.transcript.replies[message_id]}
        message = self.transcript.read_reply(message_id)
        self.messages.append(message)
        results = [self.find_result(str(call.get("id"))) for call in message.get("tool_calls", [])]
        for result in sorted(results, key=lambda node: node.order):  # in which they came
            self.add(result)

    def find_result(self, call_id: str) -> _Node:
        results = self.transcript.results.get(call_id, [])
        if len(results) != 1:
            raise LogError(
                f"Its context includes the tool call '{call_id}' with {len(results)} results, expected one."
            )
        return results[0]

    def add_system(self, node: _Node) -> None:
        if node.is_system("compact_boundary"):
            metadata = get(node.entry, "compactMetadata", dict) or {}
            if metadata.get("preservedSegment") or metadata.get("preservedMessages"):
                raise LogError("Its context was compacted in part; where the kept messages stood is not in the log.")
            self.needs_summary = True
        if node.is_system("local_command"):  # what the user ran and what it printed
            self.messages.append({"role": "user", "content": need(node.entry, "content", str)})
        if node.is_system("microcompact_boundary"):
            metadata = get(node.entry, "microcompactMetadata", dict) or {}
            cleared = need(metadata, "compactedToolIds", list)
            self.messages = [
                {**message, "content": CLEARED} if message.get("tool_call_id") in cleared else message
                for message in self.messages
            ]
