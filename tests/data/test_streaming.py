"""Streams: every conversation once per pass over workers, ranks and resumed runs; packed in a bounded buffer."""

import json
from collections import Counter

import datasets
import pytest
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from support.conversations import chat, expand
from support.preparation import conversations_to_rows
from support.trainers import (
    as_dataset,
    largest_difference,
    logged,
    logs,
    single_pass_trainer,
    stock_trainer,
)
from trl_singlepass.data import preparation
from trl_singlepass.data.conversations import example_to_rows
from trl_singlepass.data.preparation import prepare_dataset
from trl_singlepass.data.report import Report
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.training.epochs import part_of_rank
from trl_singlepass.trees.rows import Row


pytestmark = [
    # Workers are forked from a process that has threads; they use none of them.
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks.*:DeprecationWarning"),
]
SYSTEM = {"role": "system", "content": "Answer with one number and say how you found it. " * 3}
CHATS = [[SYSTEM, *chat(1 + seed % 3, seed=seed)[1:]] for seed in range(11)]
CAPACITY = 500


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(preparation, "PACKING_BUFFER", 4)


def stream(num_shards=1):
    return as_dataset(CHATS).to_iterable_dataset(num_shards=num_shards)


def packed_stream(tokenizer, num_shards=1):
    return prepare_dataset(stream(num_shards), tokenizer, RowSettings(max_row_tokens=CAPACITY), packing=True)


def trained(rows):
    """What rows train: how often each target is trained, by its token; the same for any packing of them."""
    counts = Counter()
    for row in map(Row.from_columns, rows):
        for token, weight in zip(row.input_ids, row.token_weights, strict=True):
            if weight > 0:
                counts[int(token)] += float(weight)
    return counts


@pytest.fixture(scope="module")
def whole(tokenizer):
    return trained(conversations_to_rows(as_dataset(CHATS), tokenizer, RowSettings())[0])


def test_a_packed_stream_trains_what_it_holds(tokenizer, whole):
    rows = list(packed_stream(tokenizer))
    assert trained(rows) == whole
    assert 3 <= len(rows) < len(CHATS)  # three buffers of at most four conversations
    lengths = [len(row["input_ids"]) for row in rows]
    assert max(lengths) <= CAPACITY
    assert sum(sum(row["multiplicity"]) for row in rows) > sum(lengths)


def test_the_buffer_is_bounded(tokenizer):
    """The first row comes when one buffer of conversations has been read, not at the end of the stream."""
    read = []

    def generate():
        for index, messages in enumerate(CHATS):
            read.append(index)
            yield {"messages": messages}

    source = datasets.IterableDataset.from_generator(generate)
    rows = iter(prepare_dataset(source, tokenizer, RowSettings(max_row_tokens=CAPACITY), packing=True))
    read.clear()  # the columns were looked up
    next(rows)
    assert max(read) < len(CHATS) - 1


def test_what_is_lost_adds_up_over_a_stream(tokenizer):
    settings = RowSettings(max_length=160, max_row_tokens=170)

    _, stored = conversations_to_rows(as_dataset(CHATS), tokenizer, settings)
    assert stored["num_cut_turns"] > 0
    assert stored["num_dropped_turns"] > 0
    streamed = Report("conversation", settings.bound)
    for index, messages in enumerate(CHATS):
        streamed = streamed.with_rows(example_to_rows({"messages": messages}, index, tokenizer, settings))
    assert streamed == stored


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_workers_neither_repeat_nor_lose_a_row(tokenizer, whole, num_shards):
    loader = DataLoader(packed_stream(tokenizer, num_shards), num_workers=2, batch_size=None)
    assert trained(loader) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_ranks_neither_repeat_nor_lose_a_row(tokenizer, whole, num_shards, num_workers):
    total = Counter()
    for rank in range(2):
        part = part_of_rank(packed_stream(tokenizer, num_shards), num_ranks=2, rank=rank)
        total += trained(DataLoader(part, num_workers=num_workers, batch_size=None))
    assert total == whole


def test_a_stream_goes_on_where_its_state_was_saved(tokenizer):
    everything = list(packed_stream(tokenizer))
    for position in range(len(everything)):
        first = packed_stream(tokenizer)
        iterator = iter(first)
        before = [next(iterator) for _ in range(position)]
        second = packed_stream(tokenizer)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())) if position else second.state_dict())
        after = list(second)
        got = [list(row["input_ids"]) for row in before + after]
        assert got == [list(row["input_ids"]) for row in everything]


def test_a_run_over_several_passes_resumes_where_it_was(tmp_path, tokenizer):
    num_rows = len(list(packed_stream(tokenizer)))
    shuffled = stream(2).shuffle(seed=0, buffer_size=4)  # in another order each epoch
    settings = {
        "packing": True,
        "max_row_tokens": CAPACITY,
        "max_steps": num_rows + 3,
        "save_steps": num_rows + 1,
        "save_strategy": "steps",
        "per_device_train_batch_size": 1,
    }
    one = single_pass_trainer(tmp_path, tokenizer, shuffled, **settings)
    one.train()
    resumed = single_pass_trainer(tmp_path, tokenizer, shuffled, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{num_rows + 1}"))
    assert logs(resumed)[:-1] == logs(one)[:-1]  # the last one is the mean loss since the run began
    assert resumed.state.epoch == one.state.epoch > 1
    assert largest_difference(one, resumed) == 0


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_of_a_stream_is_its_rows_once(tmp_path, tokenizer, whole, packing):
    """The last step of an epoch holds what is left, and the next epoch begins with the next step."""
    settings = {"packing": True, "max_row_tokens": CAPACITY} if packing else {}
    num_rows = len(list(packed_stream(tokenizer))) if packing else len(CHATS)
    epochs = EpochEnds()
    trainer = single_pass_trainer(
        tmp_path,
        tokenizer,
        stream(),
        per_device_train_batch_size=2,
        max_steps=2 * -(-num_rows // 2),
        kwargs={"callbacks": [epochs]},
        **settings,
    )
    epochs.trainer = trainer
    trainer.train()
    total = sum(whole.values())
    assert epochs.trained == [total, 2 * total]


class EpochEnds(TrainerCallback):
    def __init__(self):
        self.trained = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trained.append(float(self.trainer._counts._trained))


def test_a_finite_stream_counts_the_tokens_that_stock_counts(tmp_path, tokenizer):
    """Seventeen rows in steps of eight: the third step holds one row. One turn each, so that stock trains the same."""
    rows = [expand(chat(1, seed=seed))[0] for seed in range(17)]
    settings = {"per_device_train_batch_size": 8, "max_steps": 3}
    trainers = [
        make(tmp_path, tokenizer, as_dataset(rows).to_iterable_dataset(), **settings)
        for make in (single_pass_trainer, stock_trainer)
    ]
    for trainer in trainers:
        trainer.train()
    assert logged(trainers[0], "num_tokens") == logged(trainers[1], "num_tokens")
    assert logged(trainers[0], "loss") == pytest.approx(logged(trainers[1], "loss"), abs=1e-6)
    assert largest_difference(*trainers) < 1e-6
