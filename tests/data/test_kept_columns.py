"""Prepared datasets keep the columns that they had, as TRL's do; models do not get them."""

import logging

import datasets
import pytest
import torch
from transformers import GenerationConfig
from trl import LogCompletionsCallback

from support.conversations import chat
from support.image_forms import CHAT, in_column
from support.pairs import SINGLE_TURNS, TRAJECTORIES, pair
from support.preparation import prepare_pairs
from support.tiny_vision import tiny_processor
from support.trainers import dpo_trainer, largest_difference, single_pass_trainer, stock_dpo_trainer, stock_trainer
from trl_singlepass.data.bad_rows import BadRows
from trl_singlepass.data.images import hide_image_columns
from trl_singlepass.data.preparation import prepare_dataset
from trl_singlepass.data.settings import PairSettings, RowSettings


# The second cannot be trained, and the third is split between turns where rows are small.
CONVERSATIONS = [
    {"messages": chat(turns, seed=seed) if turns else [], "source": f"file {seed}", "score": {"mean": seed / 2}}
    for seed, turns in enumerate([2, 0, 6, 1])
]
PAIRS = [
    {**pair(2, seed), "chosen": pair(2, seed)["chosen"] if seed != 1 else [], "source": f"file {seed}"}
    for seed in range(4)
]


def prompts_and_completions():
    messages = [chat(2, seed=seed)[1:] for seed in range(3)]
    return [{"prompt": each[:1], "completion": each[1:], "id": i} for i, each in enumerate(messages)]


def prepare(rows, tokenizer, **settings):
    return prepare_dataset(rows, tokenizer, RowSettings(**settings), bad_rows=BadRows.DROP)


def reordered(rows):
    """The same examples, in a dataset whose order is not that of its table."""
    order = list(reversed(range(len(rows))))
    return rows.select(order).select(order)


FORMS = {
    "stored": lambda rows: rows,
    "reordered": reordered,
    "in a format": lambda rows: rows.with_format("torch"),
    "streamed": lambda rows: rows.to_iterable_dataset(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_row_tokens", [None, 150])
def test_rows_have_the_columns_of_their_conversation(tokenizer, form, max_row_tokens):
    given = datasets.Dataset.from_list(CONVERSATIONS)
    rows = list(prepare(FORMS[form](given), tokenizer, max_row_tokens=max_row_tokens).with_format(None))
    assert len(rows) == 3 if max_row_tokens is None else len(rows) > 3
    assert [row["source"] for row in rows if row["source"] != "file 2"] == ["file 0", "file 3"]
    for row in rows:
        (example,) = (each for each in given if each["source"] == row["source"])
        assert (row["messages"], row["score"]) == (example["messages"], example["score"])
        text = tokenizer.decode(row["input_ids"])
        assert example["messages"][0]["content"] in text
    alone = prepare(given.select_columns("messages"), tokenizer, max_row_tokens=max_row_tokens)
    assert [list(row["input_ids"]) for row in rows] == alone["input_ids"][:]


@pytest.mark.parametrize("form", FORMS)
def test_rows_have_the_columns_of_their_pair(tokenizer, form):
    given = datasets.Dataset.from_list(PAIRS)
    rows = list(prepare_pairs(FORMS[form](given), tokenizer, PairSettings(), bad_rows=BadRows.DROP))
    assert [row["source"] for row in rows] == ["file 0", "file 2", "file 3"]
    for row in rows:
        (example,) = (each for each in given if each["source"] == row["source"])
        assert {name: row[name] for name in example} == example


def test_nothing_is_copied_where_each_conversation_is_a_row(tmp_path, tokenizer, monkeypatch):
    datasets.Dataset.from_list(CONVERSATIONS).to_parquet(tmp_path / "rows.parquet")
    stored = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    monkeypatch.setattr(datasets.Dataset, "flatten_indices", lambda *_, **__: pytest.fail("copied"))
    rows = prepare(stored, tokenizer)
    written = {file["filename"] for file in rows.cache_files} - {file["filename"] for file in stored.cache_files}
    assert written
    assert all("source" not in datasets.Dataset.from_file(file).column_names for file in written)


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
def test_a_column_with_the_name_of_one_of_rows_gives_way_and_is_named(tokenizer, streamed, caplog):
    logging.Logger.warning_once.cache_clear()
    taken = {"token_parts": "good", "num_tokens": 3, "image_features": [1], "conversation": "a", "kept": 1}
    given = datasets.Dataset.from_list([{**CONVERSATIONS[0], **taken}])
    (row,) = prepare(given.to_iterable_dataset() if streamed else given, tokenizer)
    (alone,) = prepare(datasets.Dataset.from_list(CONVERSATIONS[:1]), tokenizer)
    assert list(row["token_parts"]) == alone["token_parts"]
    assert (row["conversation"], row["kept"]) == ("a", 1)
    assert "image_features" not in row
    (message,) = (record.message for record in caplog.records if "lacks" in record.message)
    assert all(name in message for name in ("token_parts", "num_tokens", "image_features"))


def test_stored_log_probabilities_of_a_reference_are_not_taken_for_those_of_this_one(tokenizer):
    given = datasets.Dataset.from_list([{**PAIRS[0], "ref_chosen_logps": -1.0}])
    (row,) = prepare_pairs(given, tokenizer, PairSettings())
    assert "ref_chosen_logps" not in row


def test_images_are_there_under_their_own_name():
    rows = prepare_dataset(hide_image_columns(in_column([CHAT])), tiny_processor("qwen3_vl"), RowSettings())
    assert [image.size for image in rows[0]["images"]] == [image.size for image in in_column([CHAT])[0]["images"]]


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("pairs", [False, True], ids=["conversations", "pairs"])
def test_training_is_the_same_with_and_without_them(tmp_path, tokenizer, pairs, streamed):
    make, rows = (dpo_trainer, TRAJECTORIES) if pairs else (single_pass_trainer, prompts_and_completions())
    both = []
    for more in ({}, {"seq_lengths": [1], "attention_mask": "none", "position_ids": 1, "tree": "oak"}):
        given = datasets.Dataset.from_list([{**row, **more} for row in rows])
        given = given.to_iterable_dataset() if streamed else given
        both.append(make(tmp_path, tokenizer, given, max_steps=2))
        both[-1].train()
    assert largest_difference(*both) == 0
    assert set(rows[0]) <= set(next(iter(both[1].train_dataset)))


@pytest.mark.parametrize("pairs", [False, True], ids=["conversations", "pairs"])
def test_completions_are_logged_as_by_stock(tmp_path, tokenizer, pairs):
    if pairs:
        makes, rows = (dpo_trainer, stock_dpo_trainer), datasets.Dataset.from_list(SINGLE_TURNS[:2])
    else:
        makes, rows = (single_pass_trainer, stock_trainer), datasets.Dataset.from_list(prompts_and_completions()[:2])
    logged = []
    for make in makes:
        trainer = make(tmp_path, tokenizer, rows, kwargs={"eval_dataset": rows}, learning_rate=0.0)
        callback = LogCompletionsCallback(trainer, GenerationConfig(max_new_tokens=3), num_prompts=2, freq=1)
        trainer.add_callback(callback)
        torch.manual_seed(0)
        trainer.train()
        logged.append([prompt for _, prompt, _ in callback.table])
    assert logged[0] == logged[1]
    assert len(logged[0]) == 2
