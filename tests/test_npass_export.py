"""N-pass export: the samples as they are trained, and stock SFTTrainer on them equals the single pass."""

import json

import datasets
import numpy as np
import pytest
from chat_tokenizers import make_tokenizer
from conversations import TOOLS, chat, tool_chat
from training import as_dataset, float32_model, largest_difference, logged, single_pass_trainer, stock_trainer

import trl_singlepass
from trl_singlepass import SinglePassSFTConfig
from trl_singlepass.npass_export import to_npass
from trl_singlepass.overlong import FittedSamples
from trl_singlepass.rendering import RenderingError, render_row


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def rows():
    return [{"messages": tool_chat(), "tools": json.dumps(TOOLS)}, {"messages": chat(3)}, {"messages": chat(1, 1)}]


def expected(tokenizer):
    return [sample for row in rows() for sample in render_row(row, tokenizer)]


def test_it_is_public():
    assert trl_singlepass.to_npass is to_npass


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
    exported = to_npass(
        rows(), tokenizer, SinglePassSFTConfig(max_length=60, report_to="none", use_cpu=True, bf16=False)
    )
    kept = [sample.truncated(60) for sample in expected(tokenizer)]
    kept = [sample for sample in kept if sample.is_trained]
    assert 0 < len(kept) < len(expected(tokenizer))
    assert exported["input_ids"][:] == [sample.token_ids.tolist() for sample in kept]


def test_weights_other_than_one_are_exported(monkeypatch):
    def doubled(example, index, tokenizer, settings):
        samples = tuple(
            type(s)(s.token_ids, s.loss_weights * 2, s.prompt_length) for s in render_row(dict(example), tokenizer)
        )
        return FittedSamples(samples, (), 0, 0, 0, 0)

    monkeypatch.setattr("trl_singlepass.npass_export.samples_of", doubled)
    exported = to_npass(rows(), make_tokenizer())
    for row, sample in zip(exported, expected(make_tokenizer()), strict=True):
        np.testing.assert_array_equal(row["loss_weights"], sample.loss_weights * 2)


def test_rows_that_cannot_be_rendered_are_named():
    bad = [*rows(), {"messages": [{"role": "user", "content": "Hi"}]}]
    with pytest.raises(RenderingError, match="Row 3: Expected at least one assistant message"):
        to_npass(bad, make_tokenizer())


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
