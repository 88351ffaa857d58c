"""Arrays that share their beginnings: read like plain ones, with what they share known without a comparison."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_singlepass.trees.shared_array import SharedArray


@st.composite
def families(draw):
    """Arrays that continue one another anywhere, beside plain lists of the same numbers."""
    arrays, lists = [SharedArray.whole([], np.int64)], [[]]
    for _ in range(draw(st.integers(1, 8))):
        base = draw(st.integers(0, len(arrays) - 1))
        kept = draw(st.integers(0, len(lists[base])))
        own = draw(st.lists(st.integers(0, 1), max_size=4))
        arrays.append(SharedArray(arrays[base], kept, np.array(own, np.int64)))
        lists.append(lists[base][:kept] + own)
    return arrays, lists


def common_length(one, two):
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@given(families(), st.data())
def test_they_hold_what_plain_lists_hold(family, data):
    for array, numbers in zip(*family, strict=True):
        assert len(array) == len(numbers)
        start = data.draw(st.integers(0, len(numbers)))
        assert array.tail(start).tolist() == numbers[start:]
        assert array.head(start).tail(0).tolist() == numbers[:start]
        assert array.followed_by(np.array([7])).tail(0).tolist() == [*numbers, 7]


@given(families())
def test_what_they_share_is_never_overstated_and_can_be_found_whole(family):
    pairs = list(zip(*family, strict=True))
    for array, numbers in pairs:
        assert array.shared_length(array) == len(numbers)
        for other, others in pairs:
            assert array.shared_length(other) <= common_length(numbers, others) == array.common_length(other)


def test_what_one_array_adds_to_another_is_known_to_be_shared():
    history = SharedArray.whole([1, 2, 3, 4], np.int64)
    turn, next_turn = history.followed_by(np.array([8, 9])), SharedArray(history, 3, np.array([5, 6]))
    assert (turn.shared_length(next_turn), next_turn.shared_length(turn)) == (3, 3)
    assert next_turn.followed_by(np.array([7])).shared_length(next_turn) == 5


def test_they_cannot_be_changed_through_what_is_read():
    for array in (SharedArray.whole([1, 2], np.int64), SharedArray.whole([1], np.int64).followed_by(np.array([2]))):
        with pytest.raises(ValueError, match="read-only"):
            array.tail(0)[0] = 3
