"""Tokenise the renderings of one conversation, and the text that they share only once."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from itertools import accumulate
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..trees.shared_array import SharedArray, common_prefix_length


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Ids = NDArray[np.int64]
Result = TypeVar("Result")

# Text that a tokenizer might treat differently at a border than inside a text.
_PROBES = ("x", " x", "x ", "\n", "\n\nx", "  \n x y", "é")

# Shortest beginning, in characters, whose ids are worth keeping, and how many are kept.
_LONG, _BEGINNINGS_KEPT = 1024, 64

# Calls of `map_while_tokenizing` at once: one runs Python, the others wait for the tokenizer.
_AT_ONCE = 3
# Held by the one that runs Python.
_python: ContextVar[Lock | None] = ContextVar("trl_singlepass_python", default=None)

_borders: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, int], HardBorders]] = WeakKeyDictionary()


def hard_borders(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> HardBorders:
    """Return the added tokens of a template at which `tokenizer` cuts every text before it tokenises the pieces."""
    known = _borders.setdefault(tokenizer, {})
    key = chat_template, len(tokenizer)
    if key not in known:
        borders = HardBorders(tokenizer, _candidates(tokenizer, chat_template))
        known[key] = borders if borders.hold() else HardBorders(tokenizer, [])
    return known[key]


class HardBorders:
    """
    Added tokens at which a text can be cut without changing its tokens; with none of them, texts are tokenised whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.tokens = sorted(tokens, key=len, reverse=True)  # of two that match, a tokenizer takes the longer
        self.longest = max(map(len, tokens), default=0)
        self.beginnings: dict[str, Ids] = {}
        self.backend: Any = _get_backend(tokenizer) if tokens else None
        self.pattern = re.compile("(" + "|".join(map(re.escape, self.tokens)) + ")")

    @cached_property
    def added_tokens(self) -> list[str]:
        """All tokens that were added to the tokenizer's vocabulary, the longest first."""
        return sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)

    @cached_property
    def token_ids(self) -> dict[str, Ids]:
        """The id of each border token, as an array of one element."""
        ids = self.tokenizer.convert_tokens_to_ids(self.tokens)
        return {token: np.array([id_], dtype=np.int64) for token, id_ in zip(self.tokens, ids, strict=True)}

    def split(self, text: str) -> list[str]:
        """Cut a text before and after each border token."""
        return [piece for piece in self.pattern.split(text) if piece] if self.tokens else [text]

    @property
    def needs_no_python(self) -> bool:
        """Whether the tokenizer's backend can be asked in the place of the tokenizer."""
        backend = self.backend
        return backend is not None and not (backend.truncation or backend.padding or backend.encode_special_tokens)

    def encode(self, pieces: list[str]) -> list[Ids]:
        """Return the ids of each piece, without computing offsets where nothing requires them."""
        if not self.needs_no_python:
            return _encode(self.tokenizer, pieces)
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def remember(self, beginning: dict[str, Ids]) -> None:
        """Keep the ids of long beginnings (system prompt, tools, examples), which other conversations may share."""
        for piece, ids in beginning.items():
            if len(piece) >= _LONG:
                self.beginnings.pop(piece, None)
                self.beginnings[piece] = ids
        for oldest in list(self.beginnings)[:-_BEGINNINGS_KEPT]:
            del self.beginnings[oldest]

    def hold(self) -> bool:
        """Whether pieces have the same ids alone as within a text, which a prefix space would break."""
        if not self.tokens:
            return True
        text = self.tokens[0].join(_PROBES) + "".join(self.tokens)
        pieces = self.split(text)
        alone = [self.token_ids.get(piece, ids) for piece, ids in zip(pieces, self.encode(pieces), strict=True)]
        return bool(np.array_equal(np.concatenate(alone), _encode(self.tokenizer, [text])[0]))


def tokenize(borders: HardBorders, texts: Iterable[str]) -> list[SharedArray]:
    """
    Tokenise renderings of one conversation, exactly as the tokenizer does with each whole text.

    Only what a text adds to the one before it is tokenised and stored. The texts are read one at a time, and not kept.
    """
    split = list(_split_all(borders, texts))
    known = borders.token_ids | borders.beginnings
    distinct = list(dict.fromkeys(piece for _, pieces in split for piece in pieces if piece not in known))
    with _outside_python() if borders.needs_no_python else nullcontext():
        encoded = borders.encode(distinct)
    ids = known | dict(zip(distinct, encoded, strict=True))
    borders.remember({piece: ids[piece] for _, pieces in split[:1] for piece in pieces})
    tokenized: list[SharedArray] = []
    previous, ends = SharedArray.zeros(0, np.int64), [0]
    for kept, pieces in split:
        new = [ids[piece] for piece in pieces]
        del ends[kept + 1 :]
        own = np.concatenate(new) if new else np.empty(0, np.int64)
        previous = SharedArray(previous, ends[kept], own)
        ends += list(accumulate(map(len, new), initial=ends[kept]))[1:]
        tokenized.append(previous)
    return tokenized


def map_while_tokenizing(function: Callable[..., Result], *arguments: Sequence[Any]) -> list[Result]:
    """
    Return what `map` yields as a list, but sooner: the next calls run while the tokenizer, which is written in Rust,
    works for one. Calls start in order, and only one runs Python at a time, so they need no locks of their own.
    """
    python, waiting = Lock(), deque(zip(*arguments, strict=True))
    results: list[Future[Result]] = []

    def run() -> None:
        _python.set(python)  # of this thread
        with python:
            while waiting:
                each, result = waiting.popleft(), Future[Result]()
                results.append(result)
                try:
                    result.set_result(function(*each))
                except BaseException as error:  # raised below, where its turn comes
                    waiting.clear()
                    result.set_exception(error)

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        try:
            wait([threads.submit(run) for _ in range(_AT_ONCE)])
        finally:
            waiting.clear()  # after an interrupt, no call starts
    return [result.result() for result in results]


@contextmanager
def _outside_python() -> Iterator[None]:
    """Let another call of `map_while_tokenizing` run Python. Hold no other lock: that call may need it."""
    python = _python.get()
    if python is None:
        yield
        return
    python.release()
    try:
        yield
    finally:
        python.acquire()


def tokenize_after(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """Tokenise a text that continues another, without the prefix space that some tokenizers put before a text."""
    newline, after_newline, alone = _encode(tokenizer, ["\n", "\n" + text, text])
    if np.array_equal(after_newline[: len(newline)], newline) and len(newline) + len(alone) > len(after_newline):
        return after_newline[len(newline) :]
    return alone


def common_length(left: Any, right: Any) -> int:
    """Return the length of the longest common beginning of two strings or two arrays."""
    if isinstance(left, np.ndarray):
        return common_prefix_length(left, right)
    limit = min(len(left), len(right))
    if left.startswith(right) or right.startswith(left):
        return limit
    low, high = 0, limit - 1
    while low < high:  # comparing halves is far faster than a loop over characters
        middle = (low + high + 1) // 2
        if right.startswith(left[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _split_all(borders: HardBorders, texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield how many of the previous text's pieces each text begins with, and the pieces that follow them."""
    previous, ends = "", [0]
    for text in texts:
        # A border that the texts do not share could begin within the last characters that they do share.
        shared = common_length(previous, text) - borders.longest
        kept = max(bisect_right(ends, shared) - 1, 0) if borders.tokens else 0
        pieces = borders.split(text[ends[kept] :])
        yield kept, pieces
        del ends[kept + 1 :]
        ends += list(accumulate(map(len, pieces), initial=ends[kept]))[1:]
        previous = text


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
    return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def _get_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the backend of a tokenizer with stock methods, if it can encode without offsets."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind, backend = type(tokenizer), getattr(tokenizer, "backend_tokenizer", None)
    is_stock = (
        kind.__call__ is PreTrainedTokenizerBase.__call__
        and getattr(kind, "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus
    )
    return backend if is_stock and hasattr(backend, "encode_batch_fast") else None


def _candidates(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> list[str]:
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "split_special_tokens", False):
        return []
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    plain = [
        content
        for content, token in added.items()
        if content in chat_template and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
    ]
    return [token for token in plain if not any(_overlap(token, other) for other in added if other != token)]


def _overlap(token: str, other: str) -> bool:
    """Whether an occurrence of `token` in a text may in truth be a part of `other`."""
    return token in other or any(other.endswith(token[:length]) for length in range(1, len(token)))


def split_markup(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Split markup into added tokens, tags, words and single characters: pieces that must not be split further."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.findall("|".join([*map(re.escape, added), r"<[^<>\s]*>", r"\[[^\[\]\s]*\]", r"\w+", r"\s", "."]), text)
