"""Streams: every conversation once per pass over workers, ranks and resumed runs; packed in a bounded buffer."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from support.conversations import chat, expand
from support.training import as_dataset, largest_difference, logged, single_pass_trainer, stock_trainer
from trl_singlepass.data import streaming
from trl_singlepass.data.preparation import conversations_to_rows
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.data.streaming import stream_rows
from trl_singlepass.trees.rows import Row


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning"),
    # Workers are forked from a process that has threads; they use none of them.
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks.*:DeprecationWarning"),
]
SYSTEM = {"role": "system", "content": "Answer with one number and say how you found it. " * 3}
CHATS = [[SYSTEM, *chat(1 + seed % 3, seed=seed)[1:]] for seed in range(11)]
CAPACITY = 500


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(streaming, "PACKING_BUFFER", 4)


def stream(num_shards=1):
    return as_dataset(CHATS).to_iterable_dataset(num_shards=num_shards)


def packed_stream(tokenizer, num_shards=1):
    return stream_rows(stream(num_shards), tokenizer, RowSettings(max_row_tokens=CAPACITY), packing=True)


def trained(rows):
    """What rows train: how often each target is trained, by its token; the same for any packing of them."""
    counts = Counter()
    for row in map(Row.from_columns, rows):
        for target, weight in zip(row.labels, row.loss_weights, strict=True):
            if target != -100:
                counts[int(target)] += float(weight)
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
    rows = iter(stream_rows(source, tokenizer, RowSettings(max_row_tokens=CAPACITY), packing=True))
    read.clear()  # the columns were looked up
    next(rows)
    assert max(read) < len(CHATS) - 1


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_workers_neither_repeat_nor_lose_a_row(tokenizer, whole, num_shards):
    loader = DataLoader(packed_stream(tokenizer, num_shards), num_workers=2, batch_size=None)
    assert trained(loader) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_ranks_neither_repeat_nor_lose_a_row(tokenizer, whole, num_shards, num_workers):
    total, lengths = Counter(), []
    for rank in range(2):
        loader = DataLoader(
            packed_stream(tokenizer, num_shards), num_workers=num_workers, batch_size=1, collate_fn=lambda rows: rows
        )
        loader = prepare_data_loader(
            loader, num_processes=2, process_index=rank, put_on_device=False, dispatch_batches=False
        )
        rows = [row for batch in loader for row in batch]
        lengths.append(len(rows))
        total += trained(rows)
    num_rows = len(list(packed_stream(tokenizer, num_shards)))
    if sum(lengths) == num_rows:
        assert total == whole
    else:  # one stream for both, which is filled up to whole batches of both
        assert num_shards == 1
        assert sum(lengths) == num_rows + 1
        assert not whole - total


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


def test_packed_streams_train_as_stock_does_on_the_samples(tmp_path, tokenizer):
    settings = {"max_steps": 2, "shuffle_dataset": False}
    num_rows = len(list(packed_stream(tokenizer)))
    streamed = single_pass_trainer(
        tmp_path,
        tokenizer,
        stream(),
        packing=True,
        max_row_tokens=CAPACITY,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=num_rows,
        **settings,
    )
    expanded = [row for messages in CHATS for row in expand(messages)]
    stock = stock_trainer(tmp_path, tokenizer, expanded, per_device_train_batch_size=len(expanded), **settings)
    streamed.train()
    stock.train()
    assert logged(streamed, "loss") == pytest.approx(logged(stock, "loss"), abs=1e-6)
    assert largest_difference(streamed, stock) < 1e-6


def test_a_run_over_several_passes_resumes_where_it_was(tmp_path, tokenizer):
    num_rows = len(list(packed_stream(tokenizer)))
    settings = {
        "packing": True,
        "max_row_tokens": CAPACITY,
        "max_steps": num_rows + 3,
        "save_steps": num_rows + 1,
        "save_strategy": "steps",
        "per_device_train_batch_size": 1,
    }
    one = single_pass_trainer(tmp_path, tokenizer, stream(2), **settings)
    one.train()
    resumed = single_pass_trainer(tmp_path, tokenizer, stream(2), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{num_rows + 1}"))
    assert logged(resumed, "loss") == logged(one, "loss")
    assert largest_difference(one, resumed) == 0


@pytest.mark.slow
def test_two_processes_stay_in_step_at_the_end_of_their_streams(tmp_path, tokenizer):
    """Their parts of the stream are of unequal length, and end in the middle of an accumulated step."""
    results = run_on_two_processes(tmp_path)
    assert results[0]["parameters"] == results[1]["parameters"]
    assert results[0]["num_trained_tokens"] == results[1]["num_trained_tokens"]
    assert results[0]["rows"] != results[1]["rows"]


def run_on_two_processes(tmp_path):
    worker = Path(__file__).parents[1] / "support" / "stream_worker.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        worker,
        tmp_path,
    ]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
