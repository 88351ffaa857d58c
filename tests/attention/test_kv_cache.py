"""Slots of a layer's cache: the examples of the docstrings."""

import numpy as np
import pytest

from trl_singlepass.attention.kv_cache import LayerSlots


@pytest.fixture
def slots():
    kept = np.array([2, 6, 7, 9])
    return LayerSlots.from_row(((10, 16, 4),), kept, stores=True)


def test_a_layer_that_keeps_some_slots_numbers_them_itself(slots):
    assert slots.cached_for_later == ((12, 14, 1), (15, 16, 3))


def test_positions_past_the_row_are_slots(slots):
    assert slots.locate(np.array([26, 27, 3]), row_length=20).tolist() == [21, 22, 3]


def test_a_range_that_is_not_kept_is_an_error(slots):
    with pytest.raises(AssertionError, match="tokens that are kept"):
        slots.locate(np.array([26, 28]), row_length=20)
