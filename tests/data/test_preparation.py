"""Preparation: cached under what decides its result, in several processes, with errors that name row and reason."""

import errno
import json
import re
from contextlib import nullcontext
from dataclasses import replace

import datasets
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, plain_chat, tool_chat
from support.preparation import conversations_to_rows
from support.trainers import as_dataset, single_pass_trainer
from trl_singlepass.data import conversations
from trl_singlepass.data.arrow import row_features, to_table
from trl_singlepass.data.fingerprint import tokenizer_fingerprint
from trl_singlepass.data.rows import PreparedRow
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row
from trl_singlepass.trees.sample import Sample


CHATS = [chat(3), chat(2, seed=1), tool_chat(), chat(4, seed=2)]


@pytest.fixture
def tokenizer():
    return make_tokenizer("qwen3")


@pytest.fixture
def stored(tmp_path):
    """A dataset on disk: what is made from it is cached beside it."""
    as_dataset(CHATS).save_to_disk(tmp_path / "data")
    return datasets.load_from_disk(str(tmp_path / "data"))


@pytest.fixture
def prepared(monkeypatch):
    """Numbers of the conversations that were prepared, not taken from the cache."""
    calls = []
    render = conversations.example_to_samples
    monkeypatch.setattr(conversations, "example_to_samples", lambda *args: calls.append(args[1]) or render(*args))
    return calls


def test_other_training_arguments_prepare_nothing_again(tmp_path, tokenizer, stored, prepared):
    rows = []
    for settings in ({}, {"learning_rate": 0.5, "num_train_epochs": 3, "seed": 7, "shuffle_dataset": False}):
        settings = {"packing": True, "max_length": 400, "shuffle_dataset": False, **settings}
        rows.append(single_pass_trainer(tmp_path, tokenizer, stored, **settings).train_dataset[:])
    assert prepared == [0, 1, 2, 3]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("settings", [{"max_length": 90}, {"max_row_tokens": 200}, {"overlong_turns": "drop"}])
def test_what_decides_the_rows_prepares_again(stored, tokenizer, prepared, settings):
    conversations_to_rows(stored, tokenizer, RowSettings())
    conversations_to_rows(stored, tokenizer, RowSettings(**settings))
    assert len(prepared) == 8


def test_another_template_prepares_again(stored, tokenizer, prepared):
    conversations_to_rows(stored, tokenizer, RowSettings())
    tokenizer.chat_template = tokenizer.chat_template + "\n"
    conversations_to_rows(stored, tokenizer, RowSettings())
    assert len(prepared) == 8


def test_using_a_tokenizer_does_not_change_its_fingerprint(stored, tokenizer, prepared):
    before = tokenizer_fingerprint(tokenizer)
    conversations_to_rows(stored, tokenizer, RowSettings())
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    conversations_to_rows(stored, tokenizer, RowSettings())
    assert len(prepared) == 4


def with_two_tokens_swapped(tokenizer, tokens):
    """Return a copy of a tokenizer's backend in which two tokens have each other's id."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, (one, other) = rules["model"]["vocab"], tokens
    vocab[one], vocab[other] = vocab[other], vocab[one]
    return Tokenizer.from_str(json.dumps(rules))


def swap_in_model(tokenizer):
    tokenizer.backend_tokenizer.model = with_two_tokens_swapped(tokenizer, ("r", "e")).model


def replace_backend(tokenizer):
    tokenizer._tokenizer = with_two_tokens_swapped(tokenizer, ("J", "Z"))  # which hardly any text holds


CHANGES = {
    "normalizer": lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    "pre-tokenizer": lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Digits()),
    "added token": lambda t: t.add_tokens(["<new>"]),
    "special token": lambda t: t.add_special_tokens({"pad_token": "<new>"}),
    "flag of an added token": lambda t: t.add_tokens([AddedToken("<new>", lstrip=True)]),
    "model": swap_in_model,
    "backend": replace_backend,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_rules_that_change_after_a_tokenizer_was_used_change_its_fingerprint(tokenizer, change):
    before = tokenizer_fingerprint(tokenizer)
    change(tokenizer)
    changed = tokenizer_fingerprint(tokenizer)
    assert changed != before
    assert tokenizer_fingerprint(tokenizer) == changed
    assert tokenizer_fingerprint(make_tokenizer("qwen3")) == before


def test_several_processes_prepare_the_same_rows(tokenizer):
    (one, report), (several, report_of_several) = (
        conversations_to_rows(as_dataset(CHATS), tokenizer, RowSettings(max_row_tokens=200), num_proc=n)
        for n in (1, 2)
    )
    assert one[:] == several[:]
    assert report == report_of_several


def test_costs_are_counted(tokenizer):
    rows, _ = conversations_to_rows(as_dataset(CHATS), tokenizer, RowSettings())
    for row in rows:
        ends = np.array(row["subtree_end"])
        assert row["num_tokens"] == len(ends)
        assert row["num_pairs"] == sum(sum(j <= i < ends[j] for j in range(len(ends))) for i in range(len(ends)))


def test_numbers_that_outgrow_their_column_are_refused():
    row = Row.from_tree(PrefixTree.from_samples([Sample([5, 6], [0, 1], 1)]))
    for multiplicity, fits in ((65_535, True), (65_536, False)):
        rows = [PreparedRow(replace(row, multiplicity=np.array([multiplicity, 1])))]
        with nullcontext() if fits else pytest.raises(ValueError, match="begin alike: split it"):
            assert to_table(rows, row_features())["multiplicity"].to_pylist() == [[multiplicity, 1]]


def test_turns_that_train_an_empty_block_of_reasoning_are_counted_in_the_summary():
    dataset = as_dataset([chat(2), plain_chat(3)])
    _, report = conversations_to_rows(dataset, make_tokenizer("qwen3"), RowSettings())
    assert report["num_empty_blocks"] == 3
    assert "3 turns without reasoning" in str(report)
    _, report = conversations_to_rows(dataset, make_tokenizer("qwen3_instruct_2507"), RowSettings(), bad_rows="drop")
    assert report["num_empty_blocks"] == 0
    _, report = conversations_to_rows(
        as_dataset([plain_chat(3)]), make_tokenizer("qwen3"), RowSettings(train_turns="last")
    )
    assert report["num_empty_blocks"] == 1, "of the turns that are trained"
    # The prompt holds the block: nothing of it is trained.
    switched_off = [{"messages": plain_chat(2), "chat_template_kwargs": {"enable_thinking": False}}]
    _, report = conversations_to_rows(datasets.Dataset.from_list(switched_off), make_tokenizer("qwen3"), RowSettings())
    assert report["num_empty_blocks"] == 0


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_full_disk_is_named_with_its_folder_and_left_clean(stored, tokenizer, tmp_path, monkeypatch, num_proc):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_table", "finalize"):
        monkeypatch.setattr(ArrowWriter, name, fail)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "data"))):
        conversations_to_rows(stored, tokenizer, RowSettings(), num_proc=num_proc)
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith("tmp")]
