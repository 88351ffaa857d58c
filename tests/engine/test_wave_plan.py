"""Waves of a row: every token once, ancestors first, never too many alive."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.row_training import batch_of
from support.sample_sets import reasoning_chat, sample_sets
from support.tree_masks import plan_of_eleven
from trl_singlepass.engine.wave_plan import Wave, WavePlan
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, TreePlan


@pytest.mark.parametrize(
    ("wave_tokens", "waves"),
    [
        (11, (Wave(0, 11, ()),)),
        (8, (Wave(0, 4, ((0, 4),), is_kept=True), Wave(4, 7, ()), Wave(7, 11, ()))),
        (5, (Wave(0, 4, ((0, 4),)), Wave(4, 9, ()), Wave(9, 11, ()))),
    ],
)
def test_waves_of_the_documented_row(wave_tokens, waves):
    assert WavePlan.from_tree_plan(plan_of_eleven(), wave_tokens).waves == waves


@pytest.mark.parametrize(("wave_tokens", "ends"), [(3, [2, 5, 8]), (2, [2, 5, 7, 8]), (1, [1, 2, 5, 6, 7, 8])])
def test_an_image_whose_tokens_see_each_other_is_not_cut(wave_tokens, ends):
    row = replace(TreePlan.from_subtree_end(np.full(8, 8)), images=((2, 5),))
    assert [wave.end for wave in WavePlan.from_tree_plan(row, wave_tokens, cut_images=False).waves] == ends


def row_of(sample_sets):
    row = Row.join([Row.from_tree(PrefixTree.from_samples(samples)) for samples in sample_sets])
    return row, TreePlan.from_subtree_end(row.subtree_end)


rows = st.lists(sample_sets(max_samples=5, max_length=16), min_size=1, max_size=3).map(row_of)
sizes = st.integers(1, 60)
policies = st.fixed_dictionaries(
    {"keep_history": st.booleans(), "smallest_wave": st.integers(1, 8), "allow_single_tokens": st.booleans()}
)


@given(rows, sizes, policies)
def test_waves_cover_the_row_once_in_order(row, size, policy):
    plan = WavePlan.from_tree_plan(row[1], size, **policy)
    borders = [0, *(wave.end for wave in plan.waves)]
    assert [wave.start for wave in plan.waves] == borders[:-1]
    assert borders[-1] == len(row[0])
    shortest = 1 if policy["allow_single_tokens"] else min(2, len(row[0]))
    assert all(len(wave) >= shortest for wave in plan.waves)


@given(rows, sizes, policies)
def test_no_more_tokens_than_allowed_are_alive(row, size, policy):
    plan = WavePlan.from_tree_plan(row[1], size, **policy)
    size += 0 if policy["allow_single_tokens"] else 2
    for group in plan.groups:
        kept = [wave for wave in group if wave.is_kept]
        assert kept in ([], [group[0]])
        for wave in group:
            assert len(wave) + sum(len(other) for other in kept if other is not wave) <= size
    assert plan.peak_tokens <= size
    assert policy["keep_history"] or not any(wave.is_kept for wave in plan.waves)


@given(rows, sizes, policies)
def test_what_is_handed_on_is_what_later_waves_descend_from(row, size, policy):
    row, plan = row[0], WavePlan.from_tree_plan(row[1], size, **policy)
    for group in plan.groups:
        for wave in group:
            tokens = np.arange(wave.start, wave.end)
            handed_on = [token for first, last in wave.handed_on for token in range(first, last)]
            assert handed_on == tokens[row.subtree_end[tokens] > wave.end].tolist()
        # No token of a group descends from another group.
        assert row.subtree_end[group[0].start : group[-1].end].max() <= group[-1].end


@given(rows, sizes, policies)
def test_a_branch_that_fits_is_not_torn(row, size, policy):
    row, tree_plan = row
    plan = WavePlan.from_tree_plan(tree_plan, size, **policy)
    ends = {wave.end for wave in plan.waves}
    for run in tree_plan.runs:
        room = size - max(len(wave) if wave.is_kept else 0 for wave in plan.waves)
        is_leaf = all(row.subtree_end[run.start : run.end] <= run.end)
        if is_leaf and run.prefix and run.end - run.start <= room:
            assert not ends & set(range(run.start + 1, run.end))


def test_a_history_that_fits_beside_a_branch_is_kept():
    tree_plan = batch_of([reasoning_chat(turns=6)])["tree"].plan
    history = max(end for run in tree_plan.runs for _, end in run.prefix)
    # What the first run holds after the last fork is the branch of the last turn.
    longest = max(run.end - max(run.start, history) for run in tree_plan.runs)
    plan = WavePlan.from_tree_plan(tree_plan, history + longest)
    assert plan.waves[0].is_kept
    assert len(plan.waves[0]) == history
    assert plan.num_repeated == 0
    assert f"history of {history} tokens kept, 0 tokens run twice" in str(plan)
    for cut in (
        WavePlan.from_tree_plan(tree_plan, history + longest - 1),
        WavePlan.from_tree_plan(tree_plan, history + longest, smallest_wave=longest + 1),
    ):
        assert not any(wave.is_kept for wave in cut.waves)
        assert cut.num_repeated == history


@pytest.mark.parametrize("turns", [4, 16])
def test_long_chains_run_all_but_their_last_piece_twice(turns):
    plan = WavePlan.from_tree_plan(TreePlan.from_subtree_end(np.full(10 * turns, 10 * turns)), 10)
    assert len(plan.waves) == turns
    assert plan.num_repeated == 10 * (turns - 1)
    assert plan.cached_tokens == 10 * (turns - 1)
