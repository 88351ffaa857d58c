"""Turns are selected as told, and what is too long is cut, dropped or refused; nothing is lost that is not counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.conversations import chat, tool_chat
from support.preparation import conversations_to_rows
from support.sample_sets import sample_sets
from support.trainers import as_dataset
from trl_singlepass import render_samples
from trl_singlepass.data.selection import fit_samples, parse_train_turns, select_turns
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row
from trl_singlepass.trees.sample import Sample


CHATS = [chat(5), chat(2, seed=1), tool_chat()]


def numbered(count):
    """Samples whose message index is their place."""
    return [Sample.from_prompt_and_completion([5], [6], index) for index in range(count)]


@pytest.mark.parametrize(
    ("train_turns", "kept"),
    [("all", [0, 1, 2, 3]), ("last", [3]), (2, [0, 1]), ("2", [0, 1]), (9, [0, 1, 2, 3])],
)
def test_turns_are_selected_in_order(train_turns, kept):
    samples = numbered(4)
    assert [sample.message_index for sample in select_turns(samples, train_turns)] == kept


def test_sampled_turns_depend_on_seed_and_example_and_nothing_else():
    samples = numbered(20)

    def draw(**kwargs):
        return [sample.message_index for sample in select_turns(samples, "sample:5", **kwargs)]

    assert draw(seed=1, example_index=2) == draw(seed=1, example_index=2)
    assert len(draw()) == 5
    assert draw() == sorted(draw())
    assert len({tuple(draw(seed=seed, example_index=row)) for seed in range(3) for row in range(3)}) > 6


@pytest.mark.parametrize("train_turns", [0, -1, "first", "sample:", "sample:0", True, 1.5])
def test_an_unknown_choice_of_turns_is_named(train_turns):
    with pytest.raises(ValueError, match=r"train_turns=.* is not one of 'all', 'last'"):
        parse_train_turns(train_turns)


@given(sample_sets(weights=(0.0, 1.0), trained=False), st.integers(2, 30), st.sampled_from(["truncate", "drop"]))
def test_tokens_in_are_tokens_trained_and_tokens_reported(samples, limit, overlong_turns):
    fitted = fit_samples(samples, limit, overlong_turns)
    given_tokens = sum(int((sample.loss_weights > 0).sum()) for sample in samples)
    kept, lost = fitted.counts["num_trained_tokens"], fitted.counts["num_cut_tokens"]
    assert kept + lost == given_tokens
    assert sum(int((sample.loss_weights > 0).sum()) for sample in fitted.samples) == kept
    assert all(len(sample) <= limit for sample in fitted.samples)


@pytest.mark.parametrize("overlong_turns", ["truncate", "drop"])
@pytest.mark.parametrize("bounds", [{"max_length": 150}, {"max_row_tokens": 150}, {"max_row_tokens": 200}])
def test_a_dataset_loses_no_token_that_its_report_does_not_count(tokenizer, bounds, overlong_turns):
    rows, report = conversations_to_rows(
        as_dataset(CHATS), tokenizer, RowSettings(**bounds, overlong_turns=overlong_turns)
    )
    samples = [sample for messages in CHATS for sample in render_samples(messages, tokenizer)]
    given_tokens = sum(float(sample.loss_weights.sum()) for sample in samples)
    assert sum(Row.from_columns(row).token_weights.sum() for row in rows) == report["num_trained_tokens"]
    assert report["num_trained_tokens"] + report["num_cut_tokens"] == given_tokens
    assert report["num_turns"] == len(samples)
    bound = min(bounds.values())
    long = sum(len(sample) > bound for sample in samples)
    assert report["num_cut_turns"] + report["num_dropped_turns"] == long
    if overlong_turns == "drop":
        assert report["num_cut_turns"] == 0
    tokens = sum(rows["num_tokens"]) - report["num_repeated_tokens"]
    if "max_row_tokens" in bounds and not long:
        assert report["num_repeated_tokens"] > 0
        assert tokens == sum(len(PrefixTree.from_samples(render_samples(messages, tokenizer))) for messages in CHATS)
