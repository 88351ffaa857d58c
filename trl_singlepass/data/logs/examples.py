"""
From requests to examples of a dataset.

Where a later request sent an earlier request's context and reply unchanged, and then something new, the two are one
conversation. Four requests with the contexts and replies (u: user, a: assistant)

    1: u1         → a1
    2: u1 a1 u2   → a2
    3: u1 a1 u2'  → a3      the user went back and asked something else
    4: u1 a* u2   → a4      a* is a1 without its reasoning

become one example with three requests, in which each reply is trained once, after the context that was sent:

    prompt = u1, completion = a1 u2 a2
    prompt = u1 a1 u2', completion = a3
    prompt = u1 a* u2, completion = a4

What was said is on disk; in memory is where it is, and what follows what.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

from ...rendering.conversation import Message
from .files import Spool, dump
from .lines import Json, LoggedRequest, LoggedTokens


class _Request(NamedTuple):
    conversation: int
    root: int  # node of its tools and template arguments
    history: int | None  # node of the last earlier reply in its context


class _Chain(NamedTuple):
    """Requests of which each goes on where the one before it ended, as the nodes of the first and the last reply."""

    first: int
    last: int


class MessageExamples:
    """
    The requests of a log, one example for each conversation; iterating over it gives the examples.

    Requests come in the order of the log. Where it is append-only, those of a conversation are one chain. An example
    of one chain has `messages` if every assistant message in it is a logged reply, else `prompt` and `completion`; any
    other has `requests`, each with both. Where the log names no conversation, requests that begin alike, up to the
    first message of a user, are one.
    """

    def __init__(self) -> None:
        self.num_duplicates = 0  # requests that the log holds twice, with the same reply; trained once
        self._spool = Spool()
        self._places: dict[bytes, int] = {}  # in the spool, by digest
        self._latest: dict[int, tuple[Message, int]] = {}  # messages of the latest request and their places, by `id`
        # Below the tools and arguments of a request, each message is a child of the one before it.
        self._nodes: dict[tuple[int, int], int] = {}  # by parent and place
        self._parents, self._values = array("q"), array("q")
        self._requests: dict[int, _Request] = {}  # by the node of the reply
        self._conversations: dict[str | tuple[int, ...], int] = {}  # by name, or by the places that they begin with
        self._extras: dict[int, list[str]] = {}  # which of tools and arguments there are, by root

    @property
    def num_turns(self) -> int:
        """Replies that the examples train."""
        return len(self._requests)

    @property
    def forms(self) -> Counter[str]:
        """Number of examples by form."""
        return Counter(" + ".join(self._get_form(chains)) for chains in self._get_conversations())

    @property
    def columns(self) -> list[str]:
        """Columns of the examples, in the order in which they occur."""
        columns = ([*self._get_form(chains), *self._get_extras(chains)] for chains in self._get_conversations())
        return list(dict.fromkeys(chain.from_iterable(columns)))

    def add(self, request: LoggedRequest) -> None:
        """Take a request."""
        extra = {"tools": request.tools, "chat_template_kwargs": request.chat_template_kwargs}
        node = root = self._get_node(-1, self._keep(extra))
        self._extras[root] = [column for column, value in extra.items() if value]
        places = self._locate([*request.context, request.reply])
        history = None
        for message, place in zip(request.context, places, strict=False):
            node = self._get_node(node, place)
            history = node if message["role"] == "assistant" else history
        node = self._get_node(node, places[-1])
        self.num_duplicates += node in self._requests
        roles = [message["role"] for message in request.context]
        beginning = tuple(places[: roles.index("user") + 1 if "user" in roles else len(roles)])
        conversation = self._conversations.setdefault(request.conversation or beginning, len(self._conversations))
        self._requests.setdefault(node, _Request(conversation, root, history))

    def __iter__(self) -> Iterator[Json]:
        for chains in self._get_conversations():
            read = cache(self._spool.read)  # requests of a conversation share most of their messages
            common = self._get_extras(chains)
            extra = read(self._values[self._requests[chains[0].first].root])
            example: Json = {"requests": [self._to_request(one, common, read) for one in chains]}
            if len(chains) == 1:
                (example,) = example["requests"]
                if self._requests[chains[0].first].history is None:
                    example = {"messages": [*example["prompt"], *example["completion"]]}
            yield {**example, **{column: extra[column] for column in common}}

    def _to_request(self, one: _Chain, common: Collection[str], read: Callable[[int], Json]) -> Json:
        """Return a chain as a request, without the columns that stand with the example."""
        extra, *messages = map(read, self._get_path(one.last))
        start = len(self._get_path(one.first)) - 2  # of the replies: before it are tools and context
        own = {column: value for column, value in extra.items() if value and column not in common}
        return {"prompt": messages[:start], "completion": messages[start:], **own}

    def _locate(self, messages: Sequence[Message]) -> list[int]:
        """Return the places of messages, which those of a transcript's contexts share with the request before."""
        latest, self._latest = self._latest, {}
        for message in messages:
            self._latest[id(message)] = latest.get(id(message)) or (message, self._keep(message))
        return [self._latest[id(message)][1] for message in messages]

    def _keep(self, value: Json) -> int:
        """Return the place of a value in the spool."""
        data = dump(value)
        digest = blake2b(data, digest_size=32).digest()
        if digest not in self._places:
            self._places[digest] = self._spool.add(data)
        return self._places[digest]

    def _get_node(self, parent: int, place: int) -> int:
        node = self._nodes.setdefault((parent, place), len(self._parents))
        if node == len(self._parents):
            self._parents.append(parent)
            self._values.append(place)
        return node

    def _get_conversations(self) -> Iterator[list[_Chain]]:
        """Yield the chains of each conversation, in the order of their first requests."""
        following: dict[int, int] = {}  # the first request that goes on where another one ended
        for node, request in self._requests.items():
            if request.history in self._requests:
                following.setdefault(request.history, node)
        later = set(following.values())
        chains: dict[int, list[_Chain]] = {}
        for first in (node for node in self._requests if node not in later):
            last = first
            while last in following:
                last = following[last]
            chains.setdefault(self._requests[first].conversation, []).append(_Chain(first, last))
        yield from chains.values()

    def _get_form(self, chains: Sequence[_Chain]) -> tuple[str, ...]:
        if len(chains) > 1:
            return ("requests",)
        return ("messages",) if self._requests[chains[0].first].history is None else ("prompt", "completion")

    def _get_extras(self, chains: Sequence[_Chain]) -> list[str]:
        """Return which of tools and arguments stand with an example, since all its requests have the same."""
        roots = {self._requests[one.first].root for one in chains}
        return self._extras[roots.pop()] if len(roots) == 1 else []

    def _get_path(self, node: int) -> list[int]:
        """Return the places of tools and arguments and of all messages up to a node."""
        places = []
        while node >= 0:
            places.append(self._values[node])
            node = self._parents[node]
        return places[::-1]


class TokenExamples:
    """
    Logged tokens as rows with one turn each; iterating over it gives the rows.

    Where the log names no conversation, a turn belongs to that of the turn whose prompt and completion its prompt
    begins with.
    """

    columns = ("prompt_ids", "completion_ids", "conversation_id")

    def __init__(self) -> None:
        self.num_duplicates = 0  # turns that the log holds twice; trained once
        self._spool = Spool()
        self._rows = array("q")  # their places
        self._conversations: dict[bytes, str] = {}  # by the tokens of a prompt and its completion
        self._lengths: set[int] = set()
        self._seen: set[tuple[str, bytes, int]] = set()

    @property
    def num_turns(self) -> int:
        """Turns that the rows train."""
        return len(self._rows)

    @property
    def forms(self) -> Counter[str]:
        """Number of rows by form."""
        return Counter(tokens=len(self._rows))

    def __iter__(self) -> Iterator[Json]:
        return map(self._spool.read, self._rows)

    def add(self, turn: LoggedTokens) -> None:
        """Take a turn."""
        prompt, token_ids = len(turn.prompt_ids), [*turn.prompt_ids, *turn.completion_ids]
        digests = _get_digests(token_ids, {n for n in self._lengths if n <= prompt} | {len(token_ids)})
        name = turn.conversation_id
        if name is None:
            known = self._conversations
            earlier = [known[digest] for n, digest in digests.items() if n <= prompt and digest in known]
            name = earlier[-1] if earlier else str(turn.place)
            name = known.setdefault(digests[len(token_ids)], name)
            self._lengths.add(len(token_ids))
        key = (name, digests[len(token_ids)], prompt)
        if key in self._seen:
            self.num_duplicates += 1
            return
        self._seen.add(key)
        row = (turn.prompt_ids, turn.completion_ids, name)
        self._rows.append(self._spool.add(dump(dict(zip(self.columns, row, strict=True)))))


def _get_digests(token_ids: Sequence[int], lengths: set[int]) -> dict[int, bytes]:
    """Return the digest of the first `n` tokens for each `n` of `lengths`, in ascending order."""
    digest, digests, start = blake2b(digest_size=32), {}, 0
    for length in sorted(lengths):
        digest.update(array("q", token_ids[start:length]).tobytes())
        digests[length], start = digest.digest(), length
    return digests
