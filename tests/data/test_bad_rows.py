"""Rows that cannot be trained: all named in one error, with reasons; or left out and counted, the rest untouched."""

import copy
import json
import random

import datasets
import pytest
from torch.utils.data import DataLoader

from support.conversations import TOOLS, chat, tool_chat
from support.malformed_examples import HELLO, HI, MALFORMED, SHAREGPT, TURN
from support.preparation import conversations_to_rows
from support.trainers import as_dataset, columns_of_rows, single_pass_trainer
from trl_singlepass import SinglePassSFTConfig, audit, to_npass, verify
from trl_singlepass.data import conversations as conversation_rows
from trl_singlepass.data.bad_rows import BadRowError, BadRows, UnexpectedError
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.preparation import prepare_dataset
from trl_singlepass.data.selection import OverlongTurnError
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.rendering.samples import RenderingError


pytestmark = [
    # Workers are forked from a process that has threads; they use none of them.
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks.*:DeprecationWarning"),
]
GOOD = [chat(2), chat(1, seed=1), tool_chat()]
NO_ASSISTANT = chat(1)[:2]
# Thirteen rows without an assistant, one without a role, one with a weight that is none.
BAD = [
    *[NO_ASSISTANT] * 13,
    [{**HI, "role": None}, HELLO],
    [HI, {**HELLO, "weight": -1.0}],
]
MIXED = [GOOD[0], *BAD[:7], GOOD[1], *BAD[7:], GOOD[2]]
NAMED = r"""15 of 18 rows of the train dataset cannot be trained:
- 13 rows \(1, 2, 3, 4, 5, 6, 7, 9, 10, 11 and 3 more\), the first: Expected at least one assistant message .*
- Row 15: Message 0 has no 'role'.*
- Row 16: Message 1 has weight=-1\.0\..*
bad_rows='drop' trains without such rows and counts them in the log\."""


def stream(rows):
    def generate():
        yield from copy.deepcopy(rows)

    return datasets.IterableDataset.from_generator(generate)


def ids(rows):
    return [list(row["input_ids"]) for row in rows]


@pytest.mark.parametrize("shape", MALFORMED)
def test_every_shape_has_one_clear_error_with_its_row(tokenizer, shape):
    row, reason = MALFORMED[shape]
    with pytest.raises(BadRowError, match=f"^Row 7: .*{reason}"):
        example_to_samples(row, 7, tokenizer, RowSettings())


def test_every_shape_is_left_out_of_a_stream_when_told_to(tokenizer):
    good = [{"messages": messages} for messages in GOOD]
    malformed = [row for row, _ in MALFORMED.values()]
    rows = stream([malformed[0], good[0], *malformed[1:], *good[1:]])
    kept = prepare_dataset(rows, tokenizer, RowSettings(), bad_rows="drop")
    assert ids(kept) == ids(conversations_to_rows(as_dataset(GOOD), tokenizer, RowSettings())[0])


@pytest.mark.parametrize("num_proc", [None, 2])
def test_all_bad_rows_are_named_with_count_and_reasons(tmp_path, tokenizer, num_proc):
    with pytest.raises(RenderingError, match=f"^{NAMED}$"):
        single_pass_trainer(tmp_path, tokenizer, MIXED, dataset_num_proc=num_proc)


@pytest.mark.parametrize("settings", [{}, {"dataset_num_proc": 2}, {"packing": True, "max_row_tokens": 500}])
def test_without_bad_rows_the_others_are_trained_as_if_alone(tmp_path, tokenizer, settings):
    settings = {"shuffle_dataset": False, **settings}
    dropped = single_pass_trainer(tmp_path, tokenizer, MIXED, bad_rows="drop", **settings)
    alone = single_pass_trainer(tmp_path, tokenizer, GOOD, **settings)
    assert columns_of_rows(dropped.train_dataset) == columns_of_rows(alone.train_dataset)
    assert dropped.train_dataset.column_names == alone.train_dataset.column_names


def test_dropped_rows_are_counted(tokenizer):
    _, report = conversations_to_rows(as_dataset(MIXED), tokenizer, RowSettings(), bad_rows="drop")
    _, alone = conversations_to_rows(as_dataset(GOOD), tokenizer, RowSettings())
    assert (report.num_bad_rows, report["num_examples"], report["num_turns"]) == (15, 3, alone["num_turns"])
    assert report["num_trained_tokens"] == alone["num_trained_tokens"]
    assert report["num_dropped_examples"] == 0
    assert not report.is_complete
    assert [errors.count for errors in report.bad_rows] == [13, 1, 1]
    assert str(report).startswith(
        "15 bad rows dropped (13 rows (1, 2, 3, 4, 5, 6, 7, 9, 10, 11 and 3 more), the first"
    )
    assert str(report).endswith(str(alone))


def test_a_dataset_of_bad_rows_alone_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"No turn of the train dataset is trained: 15 bad rows .* Repair its rows"):
        single_pass_trainer(tmp_path, tokenizer, BAD, bad_rows="drop")


def test_changing_one_s_mind_prepares_nothing_again(tmp_path, tokenizer, monkeypatch):
    as_dataset(MIXED).save_to_disk(tmp_path / "data")
    stored = datasets.load_from_disk(str(tmp_path / "data"))
    calls, render = [], conversation_rows.example_to_samples
    monkeypatch.setattr(conversation_rows, "example_to_samples", lambda *args: calls.append(args[1]) or render(*args))
    with pytest.raises(RenderingError):
        conversations_to_rows(stored, tokenizer, RowSettings())
    conversations_to_rows(stored, tokenizer, RowSettings(), bad_rows="drop")
    assert calls == list(range(len(MIXED)))


def test_a_turn_that_may_not_be_too_long_is_no_bad_row(tmp_path, tokenizer):
    with pytest.raises(OverlongTurnError, match="Row 0: The turn at message 2 has"):
        single_pass_trainer(tmp_path, tokenizer, GOOD, bad_rows="drop", max_length=10, overlong_turns="error")


def test_mistakes_of_the_package_are_never_dropped(tokenizer, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("an invariant")

    monkeypatch.setattr(conversation_rows, "render_with_history", broken)
    with pytest.raises(AssertionError, match="an invariant"):
        conversations_to_rows(as_dataset(GOOD), tokenizer, RowSettings(), bad_rows="drop")


@pytest.mark.parametrize("bad_rows", list(BadRows))
@pytest.mark.parametrize("error", [KeyError("surprise"), ValueError("substring not found"), TypeError("'NoneType'")])
def test_what_nobody_foresaw_stops_the_run_and_is_no_bad_row(tokenizer, monkeypatch, error, bad_rows):
    def broken(*_, **__):
        raise error

    for name in ("render_with_history", "render_conversation"):
        monkeypatch.setattr(conversation_rows, name, broken)
    with pytest.raises(UnexpectedError, match=r"^Row 0: ") as caught:
        conversations_to_rows(as_dataset(GOOD), tokenizer, RowSettings(), bad_rows=bad_rows)
    assert caught.value.__cause__ is error
    with pytest.raises(UnexpectedError):
        list(prepare_dataset(as_dataset(GOOD).to_iterable_dataset(), tokenizer, RowSettings(), bad_rows=bad_rows))
    with pytest.raises(UnexpectedError):
        audit([{"messages": messages} for messages in GOOD], tokenizer)


def test_evaluation_sets_are_named(tmp_path, tokenizer):
    sets = {"clean": as_dataset(GOOD), "dirty": as_dataset(MIXED)}
    with pytest.raises(RenderingError, match="15 of 18 rows of the dirty dataset cannot be trained"):
        single_pass_trainer(tmp_path, tokenizer, GOOD, kwargs={"eval_dataset": sets})
    trainer = single_pass_trainer(tmp_path, tokenizer, GOOD, kwargs={"eval_dataset": sets}, bad_rows="drop")
    assert columns_of_rows(trainer.eval_dataset["dirty"]) == columns_of_rows(trainer.eval_dataset["clean"])
    losses = trainer.evaluate()
    assert losses["eval_dirty_loss"] == losses["eval_clean_loss"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_stops_at_its_first_bad_row(tokenizer, num_workers):
    rows = prepare_dataset(as_dataset(MIXED).to_iterable_dataset(), tokenizer, RowSettings())
    with pytest.raises(RenderingError, match=r"Row 1: Expected at least one assistant .*\n.*stream of the train"):
        list(DataLoader(rows, num_workers=num_workers, batch_size=None))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_trains_without_bad_rows(tokenizer, num_workers):
    rows = prepare_dataset(as_dataset(MIXED).to_iterable_dataset(), tokenizer, RowSettings(), bad_rows="drop")
    given = list(DataLoader(rows, num_workers=num_workers, batch_size=None))
    assert ids(given) == ids(conversations_to_rows(as_dataset(GOOD), tokenizer, RowSettings())[0])


def test_a_trainer_on_a_stream_drops_its_bad_rows(tmp_path, tokenizer):
    rows = [MALFORMED[shape][0] for shape in ("no messages at all", "calls as JSON", "a null message")]
    dataset = stream([*rows, *({"messages": messages} for messages in GOOD)])
    with pytest.raises(RenderingError, match="Row 0: 'messages' is null"):
        single_pass_trainer(tmp_path, tokenizer, dataset).train()
    trainer = single_pass_trainer(tmp_path, tokenizer, dataset, bad_rows="drop", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["num_trained_tokens"] > 0


def config(**settings):
    return SinglePassSFTConfig(report_to="none", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_the_export_deals_with_bad_rows_as_the_trainer_does(tokenizer, num_proc):
    with pytest.raises(RenderingError, match=NAMED.replace("train dataset", "given dataset")):
        to_npass(as_dataset(MIXED), tokenizer, num_proc=num_proc)
    exported = to_npass(as_dataset(MIXED), tokenizer, config(bad_rows="drop"), num_proc=num_proc)
    assert exported[:] == to_npass(GOOD, tokenizer)[:]


def test_verify_names_all_of_them(tokenizer):
    with pytest.raises(RenderingError, match=NAMED.replace("train dataset", "given dataset")):
        verify(None, tokenizer, MIXED)


def test_the_audit_tells_the_same_rows_and_reasons(tokenizer):
    _, report = conversations_to_rows(as_dataset(MIXED), tokenizer, RowSettings(), bad_rows="drop")
    assert audit(as_dataset(MIXED), tokenizer).errors == report.bad_rows


JUNK = [None, 3, 2.5, True, "x", "", b"a", [], {}, [1], [None], ["x"], {"a": 1}, [[HI]], "[1]", "[{", {"role": "user"}]


def places(value, place=()):
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_stands_where_it_does_not_belong_is_named_or_trained(tokenizer, seed):
    """Any part of a row replaced by something else, or left out: no other error, and none that nobody foresaw."""
    rng = random.Random(seed)
    rows = [
        {"messages": tool_chat(), "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": tool_chat()[:1], "completion": tool_chat()[1:], "tools": json.dumps(TOOLS)},
        {"conversations": SHAREGPT},
        {"turns": [{**TURN, "completion_weights": [1.0]}, TURN]},
    ]
    refused = 0
    for _ in range(40):
        row = copy.deepcopy(rng.choice(rows))
        *path, last = rng.choice(list(places(row)))
        part = row
        for key in path:
            part = part[key]
        if rng.random() < 0.2:
            del part[last]
        else:
            part[last] = rng.choice(JUNK)
        reason = refusal_of(row, tokenizer)
        refused += reason is not None
        assert reason is None or reason.startswith("Row 3: "), row
        assert reason is None or "bytes is not JSON" in reason or "cannot be read" not in reason, row
    assert refused >= 10


def refusal_of(row, tokenizer):
    try:
        example_to_samples(row, 3, tokenizer, RowSettings())
    except BadRowError as error:
        return str(error)
    return None
