"""Examples that hold all requests of a conversation: one tree, each request as in an example of its own."""

import numpy as np
import pytest
from datasets import Dataset, load_dataset

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS, call, tool
from support.logs import assistant, user
from trl_singlepass.data.bad_rows import BadRowError
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.dataset_format import holds_turns
from trl_singlepass.data.preparation import prepare_dataset
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.rendering.tokenization import HardBorders
from trl_singlepass.reports.audit import audit


SYSTEM = {"role": "system", "content": "Be brief."}
START = [SYSTEM, user("Hi.")]
REPLY = assistant("Hello.", reasoning_content="A greeting.")
REQUESTS = [
    {"prompt": START, "completion": [REPLY, user("And?"), assistant("So.", reasoning_content="Hm.")]},
    {"prompt": [*START, assistant("Hello."), user("Why?")], "completion": [assistant("Because.")]},
    {"prompt": [SYSTEM, user("Summary.")], "completion": [assistant("Done.")], "tools": [tool("f", "x")]},
]
EXAMPLE = {"requests": REQUESTS, "tools": TOOLS}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("qwen3")


def calling(x):
    return assistant("", tool_calls=[call("f", x=x)])


def samples_of(example, tokenizer, **settings):
    return example_to_samples(example, 0, tokenizer, RowSettings(**settings)).samples


def test_each_request_is_trained_as_an_example_of_its_own(tokenizer):
    together = samples_of(EXAMPLE, tokenizer)
    alone = [sample for one in REQUESTS for sample in samples_of({"tools": TOOLS} | one, tokenizer)]
    assert [sample.turn_index for sample in together] == [0, 1, 2, 3]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.loss_weights, other.loss_weights)


def test_requests_that_begin_alike_are_tokenized_once_and_stay_what_they_are(tokenizer, monkeypatch):
    """Each in the context that it was sent, of a retry and of an argument that only Python takes for the same."""
    sent = [START, *([*START, calling(x), {"role": "tool", "content": "ok"}, user("And?")] for x in (1, True, 1))]
    replies = [calling(1), assistant("One."), assistant("Two."), assistant("Three.", reasoning_content="Hm.")]
    requests = [{"prompt": prompt, "completion": [reply]} for prompt, reply in zip(sent, replies, strict=True)]
    alone = [sample for request in requests for sample in samples_of(request, tokenizer)]
    calls, encode = [], HardBorders.encode
    monkeypatch.setattr(HardBorders, "encode", lambda self, pieces: calls.append(pieces) or encode(self, pieces))
    together = samples_of({"requests": requests}, tokenizer)
    assert len(calls) == 1
    assert [one.token_ids.tolist() for one in together] == [other.token_ids.tolist() for other in alone]


def test_weights_of_a_request_and_of_its_messages_are_factors(tokenizer):
    completion = [{**assistant("Because."), "weight": 0.5}]
    requests = [REQUESTS[0] | {"weight": 0}, REQUESTS[1] | {"weight": 3, "completion": completion}]
    (sample,) = samples_of({"requests": requests}, tokenizer)
    assert sample.turn_index == 2
    assert set(sample.loss_weights[sample.prompt_length :]) == {1.5}


def test_images_beside_requests_are_refused(tokenizer):
    with pytest.raises(BadRowError, match="'requests' stand beside images"):
        samples_of(EXAMPLE | {"images": [{"path": "a.png", "bytes": None}]}, tokenizer)
    assert samples_of(EXAMPLE | {"images": []}, tokenizer)


@pytest.mark.parametrize("load", ["from_list", "json"])
def test_requests_survive_arrow_beside_other_forms(tmp_path, tokenizer, load):
    rows = [EXAMPLE | {"messages": None}, {"requests": None, "tools": None, "messages": [*START, REPLY]}]
    dataset = Dataset.from_list(rows)
    if load == "json":
        dataset.to_json(tmp_path / "data.jsonl")
        dataset = load_dataset("json", data_files=str(tmp_path / "data.jsonl"), cache_dir=str(tmp_path))["train"]
    assert holds_turns(dataset)
    for before, after in zip(rows, dataset, strict=True):
        for one, other in zip(samples_of(before, tokenizer), samples_of(after, tokenizer), strict=True):
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
    prepared = prepare_dataset(dataset, tokenizer)
    assert prepared.num_rows == 2


def test_audit_counts_the_turns_of_all_requests(tokenizer):
    report = audit([EXAMPLE], tokenizer)
    assert (report.all_turns.turns, report.all_turns.trainable, report.num_trainable) == (4, 4, 1)
    assert [turn.turns for turn in report.by_turn] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ("x", "'requests' is text"),
        ([], "'requests' is an empty list"),
        ([REQUESTS[0], {"prompt": START}], "Request 1 is not an object with"),
        ([REQUESTS[0], REQUESTS[1] | {"weight": -1}], "Request 1 has weight=-1"),
        ([REQUESTS[0] | {"completion": []}], "Request 0: 'completion' is empty"),
        ([REQUESTS[0] | {"prompt": [{"role": "user"}]}], "Request 0: Message 0"),
    ],
)
def test_what_is_wrong_with_requests_is_named(tokenizer, requests, reason):
    with pytest.raises(BadRowError) as raised:
        samples_of({"requests": requests}, tokenizer)
    assert reason in str(raised.value)
