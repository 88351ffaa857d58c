"""What a dataset holds is told by its columns, whatever stands in its first row."""

import json
from inspect import signature

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from support.conversations import chat
from support.malformed_examples import HELLO, HI, SHAREGPT
from support.trainers import as_dataset, columns_of_rows, single_pass_trainer, stock_trainer
from trl_singlepass.data.dataset_format import holds_turns
from trl_singlepass.data.preparation import prepare_dataset
from trl_singlepass.rendering.samples import RenderingError
from trl_singlepass.training.compatibility import check_pairs


GOOD = {"messages": chat(2)}


def stream(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def kinds(rows):
    """The same rows as a dataset and as a stream that tells nothing of its columns."""
    return {"dataset": Dataset.from_list(rows), "stream": stream(rows)}


@pytest.mark.parametrize("kind", ["dataset", "stream"])
@pytest.mark.parametrize("first", [{"messages": None}, {"messages": []}, {"messages": [{"role": "user"}]}])
def test_a_bad_first_row_neither_turns_the_single_pass_off_nor_stops_it(tmp_path, tokenizer, first, kind):
    rows = [first, GOOD, GOOD]
    assert holds_turns(kinds(rows)[kind])
    trainer = single_pass_trainer(tmp_path, tokenizer, kinds(rows)[kind], bad_rows="drop")
    assert len(list(trainer.train_dataset)) == 2
    trainer.train()
    with pytest.raises(RenderingError, match="Row 0: "):
        list(single_pass_trainer(tmp_path, tokenizer, kinds(rows)[kind]).train_dataset)


WRONG_THROUGHOUT = {
    "JSON": ([{"messages": json.dumps([HI, HELLO])}] * 2, "'messages' is text, .*json.loads"),
    "text": ([{"messages": "Hi."}] * 2, "'messages' is text, expected a list of messages"),
    "null": ([{"messages": None}] * 2, "'messages' is null"),
    "JSON under conversations": (
        [{"conversations": json.dumps(SHAREGPT)}] * 2,
        "'conversations' is text, .*json.loads",
    ),
    "half a pair": ([{"prompt": [HI], "completion": "Hello."}] * 2, "'completion' is text, expected a list"),
    "the other half": ([{"prompt": "Hi.", "completion": [HELLO]}] * 2, "'prompt' is text, expected a list"),
    "turns": ([{"turns": "5 6 7"}] * 2, "'turns' is text, expected a list of turns"),
    "one message per row": ([{"messages": HI}] * 2, "'messages' is an object, expected a list"),
}


@pytest.mark.parametrize("kind", ["dataset", "stream"])
@pytest.mark.parametrize("case", WRONG_THROUGHOUT)
def test_columns_of_a_wrong_type_are_named_when_the_trainer_is_built(tmp_path, tokenizer, case, kind):
    rows, reason = WRONG_THROUGHOUT[case]
    with pytest.raises(
        RenderingError, match=rf"(2 of 2|first 2) rows of the train dataset.*\n- 2 rows \(0, 1\).*{reason}"
    ):
        single_pass_trainer(tmp_path, tokenizer, kinds(rows)[kind])


OTHER_COLUMNS = {
    "dialogue": (
        [{"dialogue": [HI, HELLO]}],
        "'dialogue' looks like it: dataset.rename_column.'dialogue', 'messages'.",
    ),
    "ShareGPT's singular": ([{"conversation": SHAREGPT}], "'conversation' looks like it"),
    "instructions": ([{"instruction": "Hi.", "output": "Hello."}], r"got the columns \['instruction', 'output'\]"),
    "a prompt alone": ([{"prompt": [HI]}], r"got the columns \['prompt'\]"),
}


@pytest.mark.parametrize("kind", ["dataset", "stream"])
@pytest.mark.parametrize("case", OTHER_COLUMNS)
def test_other_columns_are_named_with_the_way_out(tmp_path, tokenizer, case, kind):
    rows, reason = OTHER_COLUMNS[case]
    with pytest.raises(ValueError, match=f"The train dataset has no column to train on. Expected a conv.*{reason}"):
        single_pass_trainer(tmp_path, tokenizer, kinds(rows)[kind])


def test_pairs_are_pointed_to_their_trainer(tmp_path, tokenizer):
    rows = [{"chosen": [HI, HELLO], "rejected": [HI, HELLO]}]
    with pytest.raises(ValueError, match="holds preference pairs, which SinglePassDPOTrainer trains"):
        single_pass_trainer(tmp_path, tokenizer, Dataset.from_list(rows))


@pytest.mark.parametrize(
    "empty", [Dataset.from_dict({}), Dataset.from_dict({"messages": []}), as_dataset([GOOD]).select([]), stream([])]
)
def test_empty_datasets_are_refused(tmp_path, tokenizer, empty):
    with pytest.raises(ValueError, match=r"The train dataset is empty\. Expected at least one row\."):
        single_pass_trainer(tmp_path, tokenizer, empty)


@pytest.mark.parametrize(
    "splits",
    [
        DatasetDict(train=as_dataset([GOOD]), test=as_dataset([GOOD])),
        IterableDatasetDict(train=stream([GOOD]), test=stream([GOOD])),
        {"train": as_dataset([GOOD]), "test": as_dataset([GOOD])},
    ],
    ids=lambda splits: type(splits).__name__,
)
def test_splits_are_refused_in_trl_s_words(tmp_path, tokenizer, splits):
    errors = []
    for trainer in (single_pass_trainer, stock_trainer):
        with pytest.raises(TypeError, match=r"`train_dataset` must be a `Dataset` or `IterableDataset`, got") as error:
            trainer(tmp_path, tokenizer, splits)
        errors.append(str(error.value))
    assert errors[0].startswith(errors[1])
    assert "Pass one of its splits, train_dataset=dataset['train']; it has 'train', 'test'." in errors[0]


def test_a_list_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"got `list`\. .*train_dataset=Dataset.from_list\(rows\)"):
        holds_turns([GOOD])


def test_evaluation_sets_are_looked_at_as_well(tmp_path, tokenizer):
    for dataset, reason in (
        (Dataset.from_dict({"dialogue": [[HI, HELLO]]}), "The eval dataset has no column to train on"),
        (Dataset.from_dict({"messages": [None]}), "1 of 1 row of the eval dataset"),
        (stream([]), "The eval dataset is empty"),
        ({"more": [GOOD]}, "`more_dataset` must be a `Dataset`"),
    ):
        with pytest.raises((ValueError, TypeError), match=reason):
            single_pass_trainer(tmp_path, tokenizer, [GOOD], kwargs={"eval_dataset": dataset})
    splits = DatasetDict(one=as_dataset([GOOD]), two=as_dataset([GOOD]))
    trainer = single_pass_trainer(tmp_path, tokenizer, [GOOD], kwargs={"eval_dataset": splits})
    assert set(trainer.evaluate()) >= {"eval_one_loss", "eval_two_loss"}


STOCK = {
    "text": [{"text": "Hi."}, {"text": "Hello."}],
    "pairs of text": [{"prompt": "Hi.", "completion": "Hello."}],
    "tokens": [{"input_ids": [5, 6, 7]}],
    "tokens beside messages": [{"input_ids": [5, 6, 7], **GOOD}],
    "text beside null messages": [{"text": "Hi.", "messages": None}],
    "text beside JSON": [{"text": "Hi.", "messages": "[]"}],
}


@pytest.mark.parametrize("kind", ["dataset", "stream"])
@pytest.mark.parametrize("case", STOCK)
def test_what_stock_trains_is_left_to_it(tmp_path, tokenizer, case, kind):
    assert not holds_turns(kinds(STOCK[case])[kind])
    ours = single_pass_trainer(tmp_path, tokenizer, kinds(STOCK[case])[kind])
    stock = stock_trainer(tmp_path, tokenizer, kinds(STOCK[case])[kind])
    assert [row["input_ids"] for row in ours.train_dataset] == [row["input_ids"] for row in stock.train_dataset]


@pytest.mark.parametrize("beside", [{"prompt": "What is 0"}, {"turns": 2}, {"text": "x"}, {"completion": "y"}])
def test_columns_beside_the_messages_change_nothing(tmp_path, tokenizer, beside):
    ours = single_pass_trainer(tmp_path, tokenizer, [{**GOOD, **beside}])
    expected = single_pass_trainer(tmp_path, tokenizer, [GOOD])
    assert columns_of_rows(ours.train_dataset) == columns_of_rows(expected.train_dataset)


@pytest.mark.skipif(
    "on_mixed_types" not in signature(Dataset.from_list).parameters, reason="needs datasets' Json type"
)
def test_columns_of_any_json_are_looked_into(tmp_path, tokenizer):
    rows = [{"messages": "no list"}, {"messages": 3}, GOOD, {"messages": [None, "x"]}]
    mixed = Dataset.from_list(rows, on_mixed_types="use_json")
    with pytest.raises(RenderingError, match=r"(?s)3 of 4 rows.*Row 0: 'messages' is text.*Row 1: .* a number.*Row 3"):
        single_pass_trainer(tmp_path, tokenizer, mixed)
    trainer = single_pass_trainer(tmp_path, tokenizer, mixed, bad_rows="drop")
    expected = single_pass_trainer(tmp_path, tokenizer, [GOOD])
    assert columns_of_rows(trainer.train_dataset) == columns_of_rows(expected.train_dataset)


def test_a_transformed_dataset_is_known_by_what_comes_out_of_it(tmp_path, tokenizer):
    dataset = as_dataset([GOOD]).with_transform(lambda batch: {"input_ids": [[5, 6, 7]] * len(batch["messages"])})
    assert not holds_turns(dataset)
    with pytest.raises(ValueError, match="with_transform"):
        single_pass_trainer(tmp_path, tokenizer, as_dataset([GOOD]).with_transform(lambda batch: batch))


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
def test_rows_of_another_version_are_refused(tokenizer, tmp_path, streamed):
    rows = prepare_dataset(as_dataset([chat(2)]), tokenizer)
    former = rows.rename_columns({"token_parts": "labels", "token_weights": "loss_weights"})
    former = former.to_iterable_dataset() if streamed else former
    with pytest.raises(ValueError, match="another version") as refusal:
        single_pass_trainer(tmp_path, tokenizer, former)
    assert "token_parts" in str(refusal.value)
    with pytest.raises(ValueError, match="another version"):
        check_pairs(former, "train")


CHANGES = {
    "tree dropped": lambda row: {name: value for name, value in row.items() if name != "subtree_end"},
    "tree alone": lambda row: {"input_ids": row["input_ids"], "multiplicity": row["multiplicity"]},
    "one text": lambda row: {**row, "subtree_end": [len(row["input_ids"])] * len(row["input_ids"])},
    "tokens cut": lambda row: {**row, "input_ids": row["input_ids"][:-3]},
    "shifted": lambda row: {**row, "subtree_end": [0, *row["subtree_end"][:-1]]},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("streamed", [False, True])
def test_prepared_rows_that_were_changed_are_refused(tokenizer, tmp_path, change, streamed):
    rows = single_pass_trainer(tmp_path, tokenizer, as_dataset([chat(3), chat(2)])).train_dataset
    changed = rows.with_format(None).map(CHANGES[change], remove_columns=rows.column_names)
    dataset = changed.to_iterable_dataset() if streamed else changed

    def train():
        single_pass_trainer(tmp_path, tokenizer, dataset, max_steps=1).train()

    with pytest.raises(ValueError, match="rows"):
        train()
