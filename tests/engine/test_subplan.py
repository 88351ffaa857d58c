"""Some tokens of a row as a row of their own: each sees the ancestors that it has in the row."""

from hypothesis import given
from hypothesis import strategies as st

from support.sample_sets import sample_sets
from support.tree_masks import plan_of_eleven
from trl_singlepass.engine.wave_plan import RangeMap, WavePlan, make_subplan
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, Run, TreePlan


def test_a_wave_of_the_documented_row():
    row = plan_of_eleven()
    wave, slots = RangeMap.consecutive([(7, 11)]), RangeMap.consecutive([(0, 4)])
    assert make_subplan(row, wave, slots) == TreePlan(4, (Run(0, 2, 4, ((4, 8),)), Run(2, 4, 2, ((4, 6),))))


def plan_of(sample_sets):
    return TreePlan.from_rows([Row.from_tree(PrefixTree.from_samples(samples)) for samples in sample_sets])


rows = st.lists(sample_sets(max_samples=5, max_length=16), min_size=1, max_size=3).map(plan_of)


def ancestors(plan, position):
    """Positions of the ancestors of a token, itself included, in the order of their depth."""
    run = next(run for run in plan.runs if run.start <= position < run.end)
    return [token for first, last in (*run.prefix, (run.start, position + 1)) for token in range(first, last)]


@given(rows, st.integers(1, 60), st.booleans(), st.booleans())
def test_tokens_of_a_wave_see_their_ancestors(row, size, keep_history, allow_single_tokens):
    plan = WavePlan.from_tree_plan(row, size, keep_history=keep_history, allow_single_tokens=allow_single_tokens)
    for group in plan.groups:
        cached = RangeMap.consecutive(tokens for wave in group for tokens in wave.handed_on)
        slots = [token for first, last in cached.ranges for token in range(first, last)]
        for wave in group:
            for tokens in {((wave.start, wave.end),), wave.handed_on} - {()}:
                subplan = make_subplan(row, RangeMap.consecutive(tokens), cached)
                running = [token for first, last in tokens for token in range(first, last)]
                assert subplan.length == len(running)
                assert subplan.depths().tolist() == row.depths()[running].tolist()
                where = running + slots
                for position, token in enumerate(running):
                    assert [where[other] for other in ancestors(subplan, position)] == ancestors(row, token)
