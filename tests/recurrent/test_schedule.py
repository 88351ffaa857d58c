"""Pieces of a row: every token has one of its own, sources run first, and as little as possible is replayed."""

from hypothesis import given, settings

from support.sample_sets import reasoning_chat, sample_sets
from support.tree_masks import plan_of_eleven
from trl_singlepass.recurrent.schedule import fork_schedule, path_schedule
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, TreePlan


def test_forks_of_the_documented_row():
    schedule = fork_schedule(plan_of_eleven())
    own = [piece.ranges for piece in schedule.pieces]
    assert own == [((0, 2),), ((2, 4),), ((4, 7),), ((7, 9),), ((9, 11),)]
    assert [piece.source for piece in schedule.pieces] == [-1, 0, 1, 1, 0]
    assert schedule.batches == ((0,), (1,), (2,), (3, 4))


def plan_of(samples):
    return TreePlan.from_rows([Row.from_tree(PrefixTree.from_samples(samples))])


@settings(max_examples=100)
@given(samples=sample_sets())
def test_schedules_run_every_token_once_in_a_valid_order(samples):
    plan = plan_of(samples)
    for schedule in (fork_schedule(plan), path_schedule(plan), path_schedule(plan, reach=3)):
        own = sorted(piece.ranges[-1] for piece in schedule.pieces)
        assert [start for start, _ in own] == [0, *(end for _, end in own[:-1])]
        assert own[-1][1] == plan.length
        done = set()
        for batch in schedule.batches:
            pieces = [schedule.pieces[index] for index in batch]
            assert all(piece.source < 0 or piece.source in done for piece in pieces)
            assert len({piece.source >= 0 for piece in pieces}) == 1
            assert len(batch) == 1 or not any(piece.is_source for piece in pieces)
            assert not any(piece.is_source and piece.source >= 0 and piece.length == 1 for piece in pieces)
            done |= set(batch)
        assert done == set(range(len(schedule.pieces)))


def test_forks_run_no_token_twice_when_branches_are_long():
    schedule = fork_schedule(plan_of(reasoning_chat(6)))
    assert sum(piece.num_replayed for piece in schedule.pieces) == 0
    # All six branches together, after six pieces of history.
    assert len(schedule.batches) <= 6 + 2


def test_reach_bounds_the_history_that_is_replayed():
    plan = plan_of(reasoning_chat(6))
    assert max(piece.num_replayed for piece in path_schedule(plan, reach=3).pieces) == 3
    assert max(piece.num_replayed for piece in path_schedule(plan).pieces) > 40
