"""
From requests to examples of a dataset.

Where a later request sent an earlier request's context and reply unchanged, and then something new, the two are one
conversation. Four requests with the contexts and replies (u: user, a: assistant)

    1: u1         → a1
    2: u1 a1 u2   → a2
    3: u1 a1 u2'  → a3      the user went back and asked something else
    4: u1 a* u2   → a4      a* is a1 without its reasoning

become three examples, in which each reply is trained once, after the context that was sent:

    messages = u1 a1 u2 a2
    prompt = u1 a1 u2', completion = a3
    prompt = u1 a* u2, completion = a4
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

from ...rendering.conversation import Message
from .lines import Json
from .requests import LoggedRequest, LoggedTokens


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples of a dataset, made from the requests of a log."""

    rows: list[Json]
    num_turns: int  # replies that they train
    num_duplicates: int  # requests that the log holds twice, with the same reply; trained once


@dataclass(frozen=True, slots=True)
class _Keys:
    """Digests of the messages of a request: up to its last earlier reply (`None` without one), and with its reply."""

    history: bytes | None
    whole: bytes


def requests_to_examples(requests: Sequence[LoggedRequest]) -> Examples:
    """
    Join the requests of a conversation where the log is append-only.

    Requests come in the order of the log; those of one conversation need not be adjacent. A conversation of which
    every assistant message is a logged reply has `messages`; replies whose context holds other assistant messages have
    `prompt` and `completion`. `tools` and `chat_template_kwargs` stand where a request has them.
    """
    unique: dict[bytes, LoggedRequest] = {}
    histories: dict[bytes, bytes | None] = {}
    dumped: dict[int, bytes] = {}
    for request in requests:
        keys = _get_keys(request, dumped)
        if keys.whole not in unique:
            unique[keys.whole], histories[keys.whole] = request, keys.history
    following: dict[bytes, bytes] = {}  # the first request that goes on where another one ended
    for whole, history in histories.items():
        if history is not None and history in unique:
            following.setdefault(history, whole)
    later = set(following.values())
    rows = [_to_example([unique[key] for key in _follow(following, whole)]) for whole in unique if whole not in later]
    return Examples(rows, len(unique), len(requests) - len(unique))


def _get_keys(request: LoggedRequest, dumped: dict[int, bytes]) -> _Keys:
    """Return the digests of a request; `dumped` keeps messages by `id`, since contexts of a transcript share them."""
    roles = [message["role"] for message in request.context]
    last_reply = max((index for index, role in enumerate(roles) if role == "assistant"), default=None)
    digest, history = blake2b(_dump([request.tools, request.chat_template_kwargs])), None
    for index, message in enumerate([*request.context, request.reply]):
        if id(message) not in dumped:
            dumped[id(message)] = _dump(message)
        digest.update(dumped[id(message)])
        if index == last_reply:
            history = digest.digest()
    return _Keys(history, digest.digest())


def _dump(value: object) -> bytes:
    # Keys are not sorted: templates print schemas in the order in which they are given.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _follow(following: Mapping[bytes, bytes], first: bytes) -> Iterator[bytes]:
    key: bytes | None = first
    while key is not None:
        yield key
        key = following.get(key)


def _to_example(requests: Sequence[LoggedRequest]) -> Json:
    first, last = requests[0], requests[-1]
    assert all(later.context[: len(r.context) + 1] == [*r.context, r.reply] for r, later in pairwise(requests))
    messages = [*last.context, last.reply]
    example: dict[str, Any] = {"messages": messages}
    if any(_is_reply(message) for message in first.context):
        example = {"prompt": first.context, "completion": messages[len(first.context) :]}
    if first.tools:
        example["tools"] = first.tools
    if first.chat_template_kwargs:
        example["chat_template_kwargs"] = first.chat_template_kwargs
    return example


def _is_reply(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def tokens_to_examples(turns: Sequence[LoggedTokens]) -> Examples:
    """
    Return logged tokens as rows with one turn each.

    Turns come in the order of the log. Rows have `prompt_ids`, `completion_ids` and `conversation_id`. Where the log
    does not tell the conversation, a turn belongs to that of the turn whose prompt and completion its prompt begins
    with.
    """
    conversations: dict[bytes, str] = {}  # by the tokens of a prompt and its completion
    lengths: set[int] = set()
    unique: dict[tuple[str, bytes, int], Json] = {}
    for turn in turns:
        prompt, token_ids = len(turn.prompt_ids), [*turn.prompt_ids, *turn.completion_ids]
        digests = _get_digests(token_ids, {n for n in lengths if n <= prompt} | {len(token_ids)})
        name = turn.conversation_id
        if name is None:
            earlier = [
                conversations[digest] for n, digest in digests.items() if n <= prompt and digest in conversations
            ]
            name = earlier[-1] if earlier else str(turn.place)
            name = conversations.setdefault(digests[len(token_ids)], name)
            lengths.add(len(token_ids))
        row = {"prompt_ids": turn.prompt_ids, "completion_ids": turn.completion_ids, "conversation_id": name}
        unique.setdefault((name, digests[len(token_ids)], prompt), row)
    return Examples(list(unique.values()), len(unique), len(turns) - len(unique))


def _get_digests(token_ids: Sequence[int], lengths: set[int]) -> dict[int, bytes]:
    """Return the digest of the first `n` tokens for each `n` of `lengths`, in ascending order."""
    digest, digests, start = blake2b(), {}, 0
    for length in sorted(lengths):
        digest.update(array("q", token_ids[start:length]).tobytes())
        digests[length], start = digest.digest(), length
    return digests
