"""N-pass export: the samples as they are trained, and stock SFTTrainer on them equals the single pass."""

import json

import datasets
import numpy as np
import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS, chat, tool_chat
from support.trainers import as_dataset, float32_model, largest_difference, logged, single_pass_trainer, stock_trainer
from trl_singlepass import SinglePassSFTConfig
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.reference.export import to_npass
from trl_singlepass.rendering.samples import render_example


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def rows():
    return [{"messages": tool_chat(), "tools": json.dumps(TOOLS)}, {"messages": chat(3)}, {"messages": chat(1, 1)}]


def expected(tokenizer):
    return [sample for row in rows() for sample in render_example(row, tokenizer)]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_one_row_per_turn_with_the_tokens_that_are_trained(num_proc):
    tokenizer = make_tokenizer()
    exported = to_npass(as_dataset(rows()), tokenizer, num_proc=num_proc)
    samples = expected(tokenizer)
    assert exported.column_names == ["input_ids", "labels"]
    assert exported["input_ids"][:] == [sample.token_ids.tolist() for sample in samples]
    for row, sample in zip(exported, samples, strict=True):
        assert row["labels"] == [-100] * sample.prompt_length + sample.token_ids[sample.prompt_length :].tolist()


def test_lists_and_streams_give_the_same():
    tokenizer = make_tokenizer()
    exported = to_npass(as_dataset(rows()), tokenizer)
    assert to_npass(rows(), tokenizer)[:] == exported[:]
    assert to_npass(rows()[::-1], tokenizer)["input_ids"][-3:] == exported["input_ids"][:3]  # tools in the last row
    assert to_npass([row["messages"] for row in rows()[1:]], tokenizer)[:] == exported[3:]
    stream = list(to_npass(as_dataset(rows()).to_iterable_dataset(), tokenizer))
    assert [row["input_ids"] for row in stream] == exported["input_ids"][:]
    assert all("loss_weights" in row for row in stream)


def test_max_length_holds():
    tokenizer = make_tokenizer()
    exported = to_npass(rows(), tokenizer, config(max_length=60))
    kept = [sample.truncated(60) for sample in expected(tokenizer)]
    kept = [sample for sample in kept if sample.is_trained]
    assert 0 < len(kept) < len(expected(tokenizer))
    assert exported["input_ids"][:] == [sample.token_ids.tolist() for sample in kept]


def config(**settings):
    return SinglePassSFTConfig(report_to="none", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("settings", [{"reasoning_weight": 0.25}, {"loss_reduction": "turn"}, {"train_turns": "last"}])
def test_weights_and_choices_of_the_run_hold(settings):
    args, tokenizer = config(**settings), make_tokenizer()
    exported = to_npass(rows(), tokenizer, args)
    samples = [
        sample
        for index, row in enumerate(rows())
        for sample in example_to_samples(row, index, tokenizer, args.row_settings()).samples
    ]
    assert ("loss_weights" in exported.column_names) == ("train_turns" not in settings)
    assert len(exported) == len(samples)
    for row, sample in zip(exported, samples, strict=True):
        assert row["input_ids"] == sample.token_ids.tolist()
        weights = row.get("loss_weights", np.array(row["labels"]) != -100)
        np.testing.assert_array_equal(weights, sample.loss_weights)


def test_stock_trainer_on_the_export_equals_the_single_pass(tmp_path):
    tokenizer, data = make_tokenizer(), datasets.Dataset.from_list(rows())
    ours = single_pass_trainer(tmp_path, tokenizer, data, per_device_train_batch_size=3, max_steps=3)
    exported = to_npass(data, tokenizer)
    model = float32_model(tokenizer)
    theirs = stock_trainer(
        tmp_path, tokenizer, exported, model, per_device_train_batch_size=len(exported), max_steps=3
    )
    ours.train()
    theirs.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    assert largest_difference(ours, theirs) <= 1e-6
