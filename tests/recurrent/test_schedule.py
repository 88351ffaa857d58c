"""Pieces of a row: every token has one of its own, sources run first, and as little as possible is replayed."""

from hypothesis import given, settings

from support.sample_sets import reasoning_chat, sample_sets
from support.tree_masks import plan_of_eleven
from trl_singlepass.recurrent.schedule import Piece, fork_schedule, last_tokens, path_schedule
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, Run, TreePlan


def test_paths_of_the_documented_row():
    schedule = path_schedule(plan_of_eleven())
    assert [piece.ranges for piece in schedule.pieces] == [((0, 7),), ((0, 4), (7, 9)), ((0, 2), (9, 11))]
    assert schedule.batches == ((0, 1), (2,))
    schedule = path_schedule(plan_of_eleven(), reach=2)
    assert [piece.ranges for piece in schedule.pieces] == [((0, 7),), ((2, 4), (7, 9)), ((0, 2), (9, 11))]
    assert schedule.batches == ((0,), (1, 2))


def test_forks_of_the_documented_row():
    schedule = fork_schedule(plan_of_eleven())
    own = [piece.ranges for piece in schedule.pieces]
    assert own == [((0, 2),), ((2, 4),), ((4, 7),), ((7, 9),), ((9, 11),)]
    assert [piece.source for piece in schedule.pieces] == [-1, 0, 1, 1, 0]
    assert schedule.batches == ((0,), (1,), (2,), (3, 4))
    assert fork_schedule(plan_of_eleven(), packed=True).batches == ((0,), (1,), (2, 3, 4))


def test_packed_pieces_of_several_trees_run_level_by_level():
    rows = [Row.from_tree(PrefixTree.from_samples(reasoning_chat(3, seed=seed))) for seed in range(2)]
    schedule = fork_schedule(TreePlan.from_rows(rows), packed=True)
    *levels, branches = schedule.batches
    assert [len(level) for level in levels] == [2] * len(levels)
    assert all(schedule.pieces[index].is_source for level in levels for index in level)
    assert not any(schedule.pieces[index].is_source for index in branches)


def test_a_branch_of_an_earlier_row_replays_one_token_from_the_state_before_it():
    # Two tokens after slots 0 to 3 of an earlier row: positions 2 to 5.
    plan = TreePlan(2, (Run(0, 2, 4, ((2, 6),)),))
    assert fork_schedule(plan).pieces == (Piece(((5, 6), (0, 2)), 1, source_token=4),)


def test_the_last_tokens_of_a_path():
    assert last_tokens(((0, 4), (7, 9)), 3) == ((3, 4), (7, 9))
    assert last_tokens(((0, 4), (7, 9)), 9) == ((0, 4), (7, 9))
    assert last_tokens(((0, 4), (7, 9)), 0) == ()


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
