"""Planning a row takes next to no time, and no more per token the longer the row."""

import pytest

from benchmarks.plan_time import measure, planning, row_of


PARTS = ("plan", "block_mask_full", "block_mask_sliding", "varlen_full", "varlen_sliding")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_planning_is_linear_in_tokens(part):
    per_token = {size: planning(row_of(size), repeats=20)[part] / size for size in (8192, 16384, 32768, 65536)}
    assert max(per_token.values()) <= 1.5 * per_token[8192]


@pytest.mark.slow
def test_planning_takes_less_than_two_percent_of_a_forward_pass():
    row = measure(65536)
    assert row["tokens"] > 60000
    assert row["trees"] == 64
    assert max(row["share_flex"], row["share_varlen"]) < 0.02
