"""Weights, reductions, turn selection, history and tokenised turns through the trainer, each against its formula."""

import datasets
import numpy as np
import pytest

from support.conversations import chat, tool_chat
from support.trainers import float32_model, logged, needs_weighted_loss, parameters, single_pass_trainer
from trl_singlepass import render_samples
from trl_singlepass.data.weights import message_weights, weigh
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.trees.sample import Sample


CHATS = [chat(3), chat(2, seed=1), tool_chat()]


def with_weights(messages, weights):
    weights = iter(weights)
    return [{**m, "weight": next(weights)} if m["role"] == "assistant" else m for m in messages]


def expected_samples(tokenizer, conversations, **settings):
    samples = []
    for messages in conversations:
        of_one = render_samples(messages, tokenizer)
        weights = message_weights(messages)
        samples += weigh(of_one, [weights[sample.message_index] for sample in of_one], **settings)
    return [sample for sample in samples if sample.is_trained]


def assert_trains(tmp_path, tokenizer, dataset, samples, **settings):
    """One step on the whole dataset moves the parameters as N-pass on the samples does."""
    model = float32_model(tokenizer)
    expected = npass_loss_and_gradients(model, samples)
    settings = {"per_device_train_batch_size": 8, **settings}
    trainer = single_pass_trainer(tmp_path, tokenizer, dataset, model=model, **settings)
    before = parameters(trainer)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected.loss], abs=1e-6)
    for name, after in parameters(trainer).items():
        gradient = (before[name] - after) / trainer.args.learning_rate
        assert float((gradient - expected.gradients[name]).abs().max()) < 2e-6, name


@needs_weighted_loss
@pytest.mark.parametrize(
    ("accumulation", "settings"),
    [
        (3, {"loss_reduction": "conversation"}),
        (1, {"reasoning_weight": 0.25}),
        (3, {"loss_reduction": "turn", "reasoning_weight": 0.0}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_reductions_equal_weighted_npass_under_any_batching(tmp_path, tokenizer, accumulation, settings):
    samples = expected_samples(tokenizer, CHATS, **settings)
    batching = {"per_device_train_batch_size": 3 // accumulation, "gradient_accumulation_steps": accumulation}
    assert_trains(tmp_path, tokenizer, CHATS, samples, **settings, **batching)


@needs_weighted_loss
@pytest.mark.parametrize("loss_reduction", ["token", "turn"])
def test_message_weights_reach_the_loss(tmp_path, tokenizer, loss_reduction):
    chats = [with_weights(CHATS[0], [2.0, 0.0, 0.5]), CHATS[1]]
    samples = expected_samples(tokenizer, chats, loss_reduction=loss_reduction)
    assert len(samples) == 4
    assert_trains(tmp_path, tokenizer, chats, samples, loss_reduction=loss_reduction)


def test_a_message_that_is_not_trained_is_context(tmp_path, tokenizer):
    messages = [dict(message) for message in CHATS[0]]
    messages[2]["train"] = False
    assert_trains(tmp_path, tokenizer, [messages], render_samples(CHATS[0], tokenizer)[1:])


@needs_weighted_loss
def test_packed_rows_weigh_the_same(tmp_path, tokenizer):
    samples = expected_samples(tokenizer, CHATS, loss_reduction="turn")
    assert_trains(tmp_path, tokenizer, CHATS, samples, loss_reduction="turn", packing=True, max_row_tokens=2048)


@pytest.mark.parametrize(("train_turns", "kept"), [("last", slice(-1, None)), (2, slice(2)), ("1", slice(1))])
def test_selected_turns_are_trained_in_their_whole_context(tmp_path, tokenizer, train_turns, kept):
    samples = [sample for messages in CHATS for sample in render_samples(messages, tokenizer)[kept]]
    assert_trains(tmp_path, tokenizer, CHATS, samples, train_turns=train_turns)


def test_a_history_column_overrides_the_setting_row_by_row(tmp_path, tokenizer):
    rows = [{"messages": CHATS[0], "history": history} for history in ("keep", "template", None)]
    trainer = single_pass_trainer(tmp_path, tokenizer, rows, history="strip")
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]

    def length(history):
        return len(single_pass_trainer(tmp_path, tokenizer, CHATS[:1], history=history).train_dataset[0]["input_ids"])

    assert lengths == [length("keep"), length("template"), length("strip")]
    assert length("keep") < length("template")  # a chain


def tokenised(samples):
    return [
        {
            "prompt_ids": sample.token_ids[: sample.prompt_length].tolist(),
            "completion_ids": sample.token_ids[sample.prompt_length :].tolist(),
        }
        for sample in samples
    ]


def test_tokenised_turns_train_as_the_messages_that_they_were(tmp_path, tokenizer):
    samples = [render_samples(messages, tokenizer) for messages in CHATS]
    rows = [{"turns": tokenised(of_one)} for of_one in samples]
    assert_trains(tmp_path, tokenizer, rows, [sample for of_one in samples for sample in of_one])


def test_a_log_of_single_turns_is_gathered_by_conversation(tmp_path, tokenizer):
    samples = [render_samples(messages, tokenizer) for messages in CHATS[:2]]
    log = [
        {"conversation_id": f"c{index}", **turn} for index, of_one in enumerate(samples) for turn in tokenised(of_one)
    ]
    log = [log[0], log[3], log[1], log[4], log[2]]  # turns of two conversations as a server logs them
    everything = [sample for of_one in samples for sample in of_one]
    trainer = single_pass_trainer(tmp_path, tokenizer, log)
    assert len(trainer.train_dataset) == 2
    assert_trains(tmp_path, tokenizer, log, everything)


@needs_weighted_loss
def test_completion_weights_of_tokenised_turns_are_kept(tmp_path, tokenizer):
    """Their sum is below 1, which stock TRL would clamp."""
    turn = {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9], "completion_weights": [0.25, 0.0, 0.5]}
    sample = Sample([5, 6, 7, 8, 9], [0, 0, 0.25, 0.0, 0.5], 2)
    assert_trains(tmp_path, tokenizer, [{"turns": [turn]}], [sample])


def test_a_log_without_conversations_or_as_a_stream_is_refused(tmp_path, tokenizer):
    turn = {"prompt_ids": [5, 6], "completion_ids": [7]}
    with pytest.raises(ValueError, match="need a 'conversation_id' column"):
        single_pass_trainer(tmp_path, tokenizer, [turn])
    stream = datasets.Dataset.from_list([{"conversation_id": 0, **turn}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="A stream of single turns cannot be gathered"):
        single_pass_trainer(tmp_path, tokenizer, stream)


def test_sampled_turns_differ_between_conversations_and_stay_between_runs(tmp_path, tokenizer):
    def lengths(seed):
        trainer = single_pass_trainer(tmp_path, tokenizer, [chat(6)] * 6, train_turns="sample:1", seed=seed)
        return [len(row["input_ids"]) for row in trainer.train_dataset]

    assert lengths(0) == lengths(0)
    assert len(set(lengths(0))) > 1
    assert not np.array_equal(lengths(0), lengths(1))
