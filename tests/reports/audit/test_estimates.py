"""Confidence intervals of ratios."""

import numpy as np

from trl_singlepass.reports.audit.forecast import estimate_ratio


def test_ratio_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    bottom = rng.uniform(1, 3, 2000)
    top = 2 * bottom + rng.normal(0, 1, 2000)
    truth, covered = top.sum() / bottom.sum(), 0
    for _ in range(300):
        drawn = rng.permutation(2000)[:100]
        estimate = estimate_ratio(top[drawn], bottom[drawn], 100 / 2000)
        covered += estimate.low <= truth <= estimate.high
    assert 0.91 <= covered / 300 <= 0.99


def test_one_conversation_of_many_has_no_interval():
    assert str(estimate_ratio([3.0], [2.0], 0.5)) == "1.50 ± ?"
    assert str(estimate_ratio([3.0], [2.0], 1)) == "1.50"
