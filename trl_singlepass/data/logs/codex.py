"""
Transcripts of Codex (`~/.codex/sessions/**/rollout-*.jsonl`).

A transcript is the list of items that the model was sent and wrote, one per line. A reply is what the model wrote
between two items that it did not write. Compaction replaces the list by another one, which is a new root.

Source: `RolloutItem` in https://github.com/openai/codex, `codex-rs/protocol/src/protocol.rs`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from ...rendering.conversation import Message
from .lines import BadLines, Json, LogError, LoggedRequest, LogLine, Place, get, get_objects, need
from .openai_responses import add_item, is_reply_item, read_items, read_reply


_NOT_SENT = ("ghost_snapshot",)


def read_lines(lines: Iterable[LogLine], bad_lines: BadLines) -> Iterator[LoggedRequest]:
    """Yield each reply of each transcript with what stood before it."""
    conversations: dict[str, str] = {}
    for path, session in groupby(lines, lambda line: line.place.path):
        yield from _Session(path, conversations, bad_lines).read(session)


class _Session:
    """A transcript up to some line."""

    def __init__(self, path: str, conversations: dict[str, str], bad_lines: BadLines) -> None:
        self.bad_lines = bad_lines
        self.conversation = path
        self.conversations = conversations  # of earlier sessions, by their ids
        self.is_subagent = False
        self.is_compacted = False
        self.instructions: str | None = None
        self.context: list[Message] = []
        self.reply: list[Json] = []
        self.reply_place: Place | None = None
        self.lost: str | None = None  # why the context is not known from here on
        self.aborted = False

    def read(self, lines: Iterable[LogLine]) -> Iterator[LoggedRequest]:
        for index, line in enumerate(lines):
            try:
                payload = need(line.entry, "payload", dict)
                kind = line.entry.get("type")
                if kind == "response_item" and is_reply_item(payload):
                    self.reply_place = self.reply_place or line.place
                    self.reply.append(payload)
                    continue
                if kind in ("response_item", "compacted") or payload.get("type") == "thread_rolled_back":
                    yield from self.end_reply()
                self.take(index, line.entry, payload)
            except LogError as error:
                self.lost = str(error)
                self.bad_lines.add(line.place, self.lost)
        yield from self.end_reply()

    def take(self, index: int, entry: Json, payload: Json) -> None:
        """Take a line that the model did not write."""
        match entry.get("type"), payload.get("type"):
            case "session_meta", _:
                if index == 0:  # a fork begins with its own, then copies that of the session it comes from
                    self.begin(payload)
            case "response_item", kind:
                if kind not in _NOT_SENT:
                    add_item(self.context, payload)
            case "compacted", _:
                self.compact(payload)
            case "event_msg", "turn_aborted":
                self.aborted = bool(self.reply)
            case "event_msg", "thread_rolled_back":
                raise LogError("The thread was rolled back here; which messages stayed is not in the log.")

    def begin(self, payload: Json) -> None:
        base = payload.get("base_instructions")
        holder, key = (base, "text") if isinstance(base, dict) else (payload, "base_instructions")
        self.instructions = get(holder, key, str)
        name, source = str(payload.get("id") or self.conversation), payload.get("source")
        self.is_subagent = isinstance(source, dict) and "subagent" in source
        match source:
            case {"subagent": {"thread_spawn": {"parent_thread_id": str(parent)}}}:
                self.conversation = self.conversations.get(parent, parent)
            case _:
                self.conversation = name
        self.conversations[name] = self.conversation

    def compact(self, payload: Json) -> None:
        self.lost, self.is_compacted = None, True
        if get(payload, "replacement_history", list) is None:
            raise LogError("The context was compacted here, and what replaced it is not in the log.")
        items = get_objects(payload, "replacement_history")
        self.context = read_items(item for item in items if item.get("type") not in _NOT_SENT)

    def end_reply(self) -> Iterator[LoggedRequest]:
        """Yield the reply that is complete, with its context; then it is context itself."""
        items, place = self.reply, self.reply_place
        self.reply, self.reply_place = [], None
        if place is None:
            return
        instructions: list[Message] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        with self.bad_lines.at(place):
            reply, hidden = read_reply(items)
            if self.lost:
                raise LogError(f"Its context is unknown: {self.lost}")
            if self.aborted:
                raise LogError("The reply was interrupted.")
            yield LoggedRequest(
                place,
                [*instructions, *self.context],
                reply,
                has_hidden_reasoning=hidden,
                conversation=self.conversation,
                is_subagent=self.is_subagent,
                follows_compaction=self.is_compacted,
            )
        self.aborted = False
        try:
            self.context += read_items(items)
        except LogError as error:
            self.lost = str(error)
