"""Arrays that begin like one another, each stored as what it adds to the one before."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class SharedArray:
    """
    An array that begins with the first entries of another one, which it shares with it.

    The samples of a conversation of N turns repeat its beginning N times. Stored as arrays, their tokens take memory
    and time that grow with the square of N; stored like this, only the tokens that are new in each turn.

        base [1, 2, 3, 4], kept = 3, own = [7, 8]    ->    [1, 2, 3, 7, 8]

    `base` is `None` for an array that stands alone.
    """

    __slots__ = ("_num_bases", "base", "kept", "own")

    def __init__(self, base: SharedArray | None, kept: int, own: NDArray[Any]) -> None:
        self.base, self.kept, self.own = base, kept, own
        self._num_bases: int = 0 if base is None else base._num_bases + 1

    @classmethod
    def whole(cls, array: ArrayLike, dtype: Any) -> SharedArray:
        """Return an array that shares nothing. It is not copied, and cannot be changed through the result."""
        own = np.asarray(array, dtype=dtype).view()
        own.setflags(write=False)
        return cls(None, 0, own)

    @classmethod
    def zeros(cls, length: int, dtype: Any) -> SharedArray:
        """Return that many zeros, which take no memory."""
        return cls(None, 0, np.ndarray(length, dtype, bytes(np.dtype(dtype).itemsize), strides=(0,)))

    def __len__(self) -> int:
        return self.kept + len(self.own)

    def followed_by(self, own: NDArray[Any]) -> SharedArray:
        """Return this array with further entries behind it."""
        own = own.view()
        own.setflags(write=False)
        return SharedArray(self, len(self), own)

    def head(self, length: int) -> SharedArray:
        """Return the first `length` entries."""
        return SharedArray(self.base, min(self.kept, length), self.own[: max(length - self.kept, 0)])

    def tail(self, start: int) -> NDArray[Any]:
        """Return the entries from position `start` on."""
        array, end = self, len(self)
        parts: list[NDArray[Any]] = []
        while start < array.kept and array.base is not None:
            parts.append(array.own[: max(end - array.kept, 0)])
            array, end = array.base, min(end, array.kept)
        joined = array.own[start - array.kept : max(end - array.kept, 0)]
        if parts:
            joined = np.concatenate([joined, *parts[::-1]])
        joined.setflags(write=False)
        return joined

    def shared_length(self, other: SharedArray) -> int:
        """Return how many entries at the start are certain to be those of another array, without comparing any."""
        one, length = self, len(self)
        two, other_length = other, len(other)
        while one is not two:
            if one.base is not None and one._num_bases >= two._num_bases:
                one, length = one.base, min(length, one.kept)
            elif two.base is not None:
                two, other_length = two.base, min(other_length, two.kept)
            else:
                return 0
        return min(length, other_length)

    def common_length(self, other: SharedArray) -> int:
        """Return how many entries at the start are those of another array."""
        start = self.shared_length(other)
        if start == min(len(self), len(other)):
            return start
        return start + common_prefix_length(self.tail(start), other.tail(start))


def common_prefix_length(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    length = min(len(a), len(b))
    if length == 0:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length
