"""Token ids of the renderings of one conversation, with the text that they share tokenised once."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray


Ids = NDArray[np.int64]

# Text of each shape that a tokenizer could treat differently at a border than inside a text.
_PROBES = ("x", " x", "x ", "\n", "\n\nx", "  \n x y", "é")

_borders: WeakKeyDictionary[Any, dict[tuple[str, int], "HardBorders"]] = WeakKeyDictionary()


def hard_borders(tokenizer: Any, chat_template: str) -> "HardBorders":
    """Return the added tokens of a template at which `tokenizer` cuts every text before it tokenises the pieces."""
    known = _borders.setdefault(tokenizer, {})
    key = chat_template, len(tokenizer)
    if key not in known:
        borders = HardBorders(tokenizer, _candidates(tokenizer, chat_template))
        known[key] = borders if borders.hold() else HardBorders(tokenizer, [])
    return known[key]


class HardBorders:
    """
    Added tokens at which a text can be cut without changing its tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer that the tokens belong to.
        tokens (`list[str]`):
            The tokens. With none of them, texts are tokenised whole.
    """

    def __init__(self, tokenizer: Any, tokens: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.tokens = sorted(tokens, key=len, reverse=True)  # of two that match, a tokenizer takes the longer
        self.longest = max(map(len, tokens), default=0)
        self.pattern = re.compile("(" + "|".join(map(re.escape, self.tokens)) + ")")

    @cached_property
    def token_ids(self) -> dict[str, Ids]:
        """The id of each border token, as an array of one element."""
        ids = self.tokenizer.convert_tokens_to_ids(self.tokens)
        return {token: np.array([id_], dtype=np.int64) for token, id_ in zip(self.tokens, ids, strict=True)}

    def split(self, text: str) -> list[str]:
        """Cut a text before and after each border token."""
        return [piece for piece in self.pattern.split(text) if piece] if self.tokens else [text]

    def hold(self) -> bool:
        """Whether pieces tokenise to the same ids alone as within a text: not so where a text gets a prefix space."""
        if not self.tokens:
            return True
        text = self.tokens[0].join(_PROBES) + "".join(self.tokens)
        return bool(np.array_equal(tokenize(self, [text])[0], _encode(self.tokenizer, [text])[0]))


def tokenize(borders: HardBorders, texts: Sequence[str]) -> list[Ids]:
    """
    Tokenise renderings of one conversation.

    Args:
        borders (`HardBorders`):
            Where the texts may be cut.
        texts (`list[str]`):
            The renderings. Neighbours should share as much of their beginnings as possible.

    Returns:
        `list[numpy.ndarray]`: The ids of each text, exactly as the tokenizer gives them for the whole text.
    """
    split = list(_split_all(borders, texts))
    distinct = list(dict.fromkeys(piece for _, pieces in split for piece in pieces if piece not in borders.token_ids))
    ids = dict(zip(distinct, _encode(borders.tokenizer, distinct), strict=True)) | borders.token_ids
    tokenized: list[Ids] = []
    previous, ends = np.array([], np.int64), [0]
    for kept, pieces in split:
        new = [ids[piece] for piece in pieces]
        previous = np.concatenate([previous[: ends[kept]], *new])
        ends = [*ends[:kept], *accumulate(map(len, new), initial=ends[kept])]
        tokenized.append(previous)
    return tokenized


def tokenize_after(tokenizer: Any, text: str) -> Ids:
    """Tokenise a text that continues another, without the prefix space that some tokenizers put before a text."""
    newline, after_newline, alone = _encode(tokenizer, ["\n", "\n" + text, text])
    if np.array_equal(after_newline[: len(newline)], newline) and len(newline) + len(alone) > len(after_newline):
        return after_newline[len(newline) :]
    return alone


def common_length(left: Any, right: Any) -> int:
    """Return the length of the longest common beginning of two strings or two arrays."""
    limit = min(len(left), len(right))
    if isinstance(left, np.ndarray):
        differing = np.flatnonzero(left[:limit] != right[:limit])
        return int(differing[0]) if len(differing) else limit
    if left[:limit] == right[:limit]:
        return limit
    low, high = 0, limit - 1  # comparing slices is far faster than a loop over characters
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split_all(borders: HardBorders, texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield how many of the previous text's pieces each text begins with, and the pieces that follow them."""
    previous, ends = "", [0]
    for text in texts:
        # A border that the texts do not share could begin within the last characters that they do share.
        shared = common_length(previous, text) - borders.longest
        kept = max(bisect_right(ends, shared) - 1, 0) if borders.tokens else 0
        pieces = borders.split(text[ends[kept] :])
        yield kept, pieces
        previous, ends = text, [*ends[:kept], *accumulate(map(len, pieces), initial=ends[kept])]


def _encode(tokenizer: Any, texts: list[str]) -> list[Ids]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
    return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def _candidates(tokenizer: Any, chat_template: str) -> list[str]:
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
