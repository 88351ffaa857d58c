"""Turns that are tokens already: samples as they stand, gathered from logs; what is wrong with one is named."""

import pytest

from support.malformed_examples import LOG, TURN
from support.preparation import conversations_to_rows
from support.trainers import as_dataset, single_pass_trainer
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.data.tokenized_turns import tokenized_turns_to_samples
from trl_singlepass.rendering.samples import RenderingError


def test_tokenised_turns_are_samples():
    turns = [
        {"prompt_ids": [5, 6], "completion_ids": [7], "completion_weights": None},
        {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9], "completion_weights": [0.5, 0]},
    ]
    first, second = tokenized_turns_to_samples(turns, vocab_size=10)
    assert first.token_ids.tolist() == [5, 6, 7]
    assert first.loss_weights.tolist() == [0, 0, 1]
    assert second.loss_weights.tolist() == [0, 0, 0, 0.5, 0]
    assert (second.prompt_length, second.message_index) == (3, 1)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "at least one turn"),
        (["x"], "Turn 0 is text, expected an object"),
        ([{"prompt_ids": [1], "completion_ids": [1], "completion_weights": "x"}], "not a list of numbers"),
        ([{"prompt_ids": [1]}], "Turn 0 has no 'completion_ids'; got the keys"),
        ([{"prompt_ids": [1], "completion_ids": []}], "Turn 0 has empty 'completion_ids'"),
        ([{"prompt_ids": [], "completion_ids": [1]}], "Turn 0 has empty 'prompt_ids'"),
        ([{"prompt_ids": [1], "completion_ids": [10]}], "Turn 0 has the token id 10, but the vocabulary"),
        ([{"prompt_ids": [-1], "completion_ids": [1]}], "Turn 0 has the token id -1"),
        (
            [{"prompt_ids": [1], "completion_ids": [1], "completion_weights": [1, 1]}],
            "Turn 0 has 2 completion_weights for 1 completion tokens",
        ),
        (
            [{"prompt_ids": [1], "completion_ids": [1], "completion_weights": [-1]}],
            r"Turn 0 .*completion_weights\[0\]",
        ),
    ],
)
def test_wrong_turns_are_named(turns, message):
    with pytest.raises(ValueError, match=message):
        tokenized_turns_to_samples(turns, vocab_size=10)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_of_a_log_are_named_by_their_place_in_it(tmp_path, tokenizer, num_proc):
    reasons = (
        "(?s)3 of 6 rows of the train dataset cannot be trained:\n"
        r"- 2 rows \(2, 4\), the first: Its 'conversation_id' is null.*- Row 1: The turn has no 'completion_ids'"
    )
    with pytest.raises(RenderingError, match=reasons):
        single_pass_trainer(tmp_path, tokenizer, LOG, dataset_num_proc=num_proc)
    trainer = single_pass_trainer(tmp_path, tokenizer, LOG, bad_rows="drop", shuffle_dataset=False)
    assert [list(row["input_ids"]) for row in trainer.train_dataset] == [[5, 6, 7, 9, 7], [5, 6, 8]]


def test_turns_of_a_row_share_its_fate(tokenizer):
    rows = [{"turns": [TURN]}, {"turns": [TURN, {**TURN, "completion_ids": []}]}, {"turns": None}, {"turns": [TURN]}]
    with pytest.raises(RenderingError, match=r"(?s)2 of 4 rows.*- Row 1: Turn 1 has empty.*- Row 2: 'turns' is null"):
        conversations_to_rows(as_dataset(rows), tokenizer, RowSettings())
    kept, report = conversations_to_rows(as_dataset(rows), tokenizer, RowSettings(), bad_rows="drop")
    assert [len(row) for row in kept["input_ids"]] == [3, 0, 0, 3]
    assert (report["num_turns"], report.num_bad_rows) == (2, 2)
