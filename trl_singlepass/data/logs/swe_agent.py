"""
Trajectories of SWE-agent (`*.traj`).

Each step has the model's `response` and, since version 1.1, the `query` that it answers. Without it, the context is
the `history` up to the reply, unless a history processor rewrote it for the model. A step that SWE-agent repeated
because it could not use the reply is in no history, so its tool calls are lost.

Source: `TrajectoryStep` and `HistoryItem` in https://github.com/SWE-agent/SWE-agent, `sweagent/types.py`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...rendering.conversation import Message
from .anthropic import read_assistant
from .lines import (
    BadLines,
    Json,
    LogError,
    LoggedRequest,
    LogLine,
    Place,
    assistant_message,
    get,
    get_objects,
    given,
    join_text,
)
from .openai_chat import read_message


# History processors that leave the text of messages alone.
_FAITHFUL = ("default", "cache_control", "tag_tool_call_observations")
# The query of a step in which SWE-agent spoke itself, to say why it ends.
_NO_QUERY: list[Json] = [{}]


def read_lines(lines: Iterable[LogLine], bad_lines: BadLines) -> Iterator[LoggedRequest]:
    """Yield each step of each attempt of each trajectory with the messages that were sent."""
    for line in lines:
        with bad_lines.at(line.place):
            attempts, path = get_objects(line.entry, "attempts"), line.place.path
            named = {f"{path}, attempt {number}": entry for number, entry in enumerate(attempts, start=1)}
            read = [_Attempt.from_entry(entry, path, place) for place, entry in (named or {path: line.entry}).items()]
            for attempt in read:
                yield from attempt.read(bad_lines)


@dataclass(frozen=True)
class _Attempt:
    log: str  # attempts of one file are about one task
    place: str
    steps: list[Json]
    history: list[Json]

    @classmethod
    def from_entry(cls, entry: Json, log: str, place: str) -> _Attempt:
        attempt = cls(log, place, get_objects(entry, "trajectory"), get_objects(entry, "history"))
        if not attempt.steps and not attempt.history:
            raise LogError("'trajectory' and 'history' are missing.")
        if not any(step.get("query") for step in attempt.steps):
            _check_history_was_sent(entry)
        return attempt

    @property
    def actions(self) -> list[int]:
        """Positions of the replies in the history, SWE-agent's own last words included."""
        return [
            position
            for position, item in enumerate(self.history)
            if item.get("role") == "assistant" and item.get("message_type") == "action" and not item.get("is_demo")
        ]

    def read(self, bad_lines: BadLines) -> Iterator[LoggedRequest]:
        has_queries = any(step.get("query") for step in self.steps)
        for number, (context, reply) in enumerate(self.with_queries() if has_queries else self.from_history(), 1):
            place = Place(self.place, number)
            with bad_lines.at(place):
                if isinstance(reply, LogError):
                    raise reply
                if reply is not None:
                    messages = [_read_item(item) for item in context]
                    yield LoggedRequest(place, messages, _read_item(reply), conversation=self.log)

    def from_history(self) -> Iterator[tuple[Sequence[Json], Json | None]]:
        """Yield context and reply of each step; `None` for what SWE-agent said itself."""
        for position in self.actions:
            item = self.history[position]
            context = [earlier for earlier in self.history[:position] if earlier.get("agent") == item.get("agent")]
            yield context, item if item.get("action") else None

    def with_queries(self) -> Iterator[tuple[Sequence[Json], Json | LogError | None]]:
        """Yield query and reply of each step, or why the reply is not known; `None` for what SWE-agent said itself."""
        actions = [self.history[position] for position in self.actions]
        has_calls = any(item.get("tool_calls") for item in actions)
        for index, step in enumerate(self.steps):
            query, response = get_objects(step, "query"), step.get("response")
            if not self.was_repeated(index, len(actions)):
                item = actions.pop(0) if actions else {}
                if query == _NO_QUERY:
                    yield [], None
                elif query and item.get("content") == response:
                    yield query, item
                else:
                    yield [], LogError("The step and the history do not match, so its reply is not known.")
            elif has_calls:
                yield [], LogError("The step was repeated, and the tool calls of its reply are not in the trajectory.")
            else:
                yield query, {"role": "assistant", "content": response}

    def was_repeated(self, index: int, num_actions: int) -> bool:
        """Return whether SWE-agent asked again, given how many replies are left in the history."""
        query, following = self.steps[index].get("query"), self.steps[index + 1 :]
        if not following or query == _NO_QUERY:
            return False
        later = get_objects(following[0], "query") or _NO_QUERY
        if later == _NO_QUERY:
            return num_actions < 1 + len(following)
        # What could not be used is sent back for this one query, beside what is wrong with it.
        return later == query or (len(later) > 1 and later[-2].get("message_type") == "assistant")


def _check_history_was_sent(entry: Json) -> None:
    config = get(entry, "replay_config", dict)
    if config is None:
        raise LogError(
            "The steps have no 'query' and the file no 'replay_config', so what was sent is not known. Versions of "
            "SWE-agent since 1.1 write both."
        )
    processors = get_objects(get(config, "agent", dict) or {}, "history_processors")
    rewriting = [str(processor.get("type")) for processor in processors if processor.get("type") not in _FAITHFUL]
    if rewriting:
        raise LogError(
            f"The steps have no 'query', and the history processor '{rewriting[0]}' rewrote what was sent. Versions "
            "of SWE-agent since 1.1 write queries."
        )


def _read_item(item: Json) -> Message:
    if item.get("role") == "tool":
        content = join_text(item.get("content"), "the result of a tool")
        call_ids = get(item, "tool_call_ids", list) or [None]
        return given(role="tool", content=content or "", tool_call_id=call_ids[0])
    message = read_message({key: item.get(key) for key in ("role", "content", "tool_calls")})
    thinking = get_objects(item, "thinking_blocks")
    if not thinking:
        return message
    reasoning = read_assistant(thinking)[0].get("reasoning_content")
    return assistant_message(message.get("content"), reasoning, message.get("tool_calls"))
