"""The trainer as a drop-in replacement: every kind of dataset, logs, resuming, the model card."""

import functools
import logging
import warnings

import pytest
import torch
from transformers import TrainingArguments

import trl_singlepass
from support.conversations import chat, expand, plain_chat, tool_chat
from support.trainers import (
    as_dataset,
    float32_model,
    largest_difference,
    logged,
    logs,
    single_pass_trainer,
    stock_trainer,
)
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer, render_samples


CHATS = [chat(3), chat(2, seed=1), tool_chat()]


SYSTEM = {"role": "system", "content": "Answer with one number and say how you found it. " * 6}
# All but the last have the same long system prompt.
WITH_SYSTEM = [*([SYSTEM, *chat(1 + seed % 3, seed=seed)[1:]] for seed in range(5)), tool_chat()]
SHAREGPT = [
    {"from": "human" if message["role"] == "user" else "gpt", "value": message["content"]}
    for message in plain_chat(2)[1:]
]
PACKED = {"packing": True, "max_row_tokens": 450}
ROW_BY_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 99}
# Rows, the conversations that they hold, settings, and how many rows they become.
CASES = {
    "prompt and completion": ([{"prompt": chat(3)[:3], "completion": chat(3)[3:]}], None, {}, 1),
    "ShareGPT": ([{"conversations": SHAREGPT}], [plain_chat(2)[1:]], {}, 1),
    "packed": (WITH_SYSTEM, WITH_SYSTEM, PACKED, 3),
    "packed, row by row": (WITH_SYSTEM, WITH_SYSTEM, {**PACKED, **ROW_BY_ROW}, 3),
    "streamed and packed": (WITH_SYSTEM, WITH_SYSTEM, PACKED, None),
    "split": (CHATS, CHATS, {"max_row_tokens": 200}, 4),
    "split and packed": (CHATS, CHATS, {"max_row_tokens": 200, "packing": True}, 4),
}


def assert_trained_as_stock(ours, tmp_path, tokenizer, samples, **settings):
    stock = stock_trainer(tmp_path, tokenizer, samples, per_device_train_batch_size=len(samples), **settings)
    for trainer in (ours, stock):
        trainer.train()
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), abs=1e-6)
    assert logged(ours, "num_tokens") == logged(stock, "num_tokens")
    assert largest_difference(ours, stock) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_rows_train_as_their_samples_do_in_stock(tmp_path, tokenizer, name):
    """Of a prompt and completion only the completion is trained, which has two answers here."""
    rows, conversations, settings, num_rows = CASES[name]
    rows = as_dataset(rows)
    rows = rows.to_iterable_dataset() if "streamed" in name else rows
    ours = single_pass_trainer(tmp_path, tokenizer, rows, **{"per_device_train_batch_size": 99, **settings})
    assert num_rows is None or len(ours.train_dataset) == num_rows
    if "max_row_tokens" in settings:
        assert max(len(row["input_ids"]) for row in ours.train_dataset) <= settings["max_row_tokens"]
    samples = [row for messages in conversations or [] for row in expand(messages)] or expand(chat(3))[1:]
    assert_trained_as_stock(ours, tmp_path, tokenizer, samples)


def test_max_length_trains_what_stock_trains_on_truncated_samples(tmp_path, tokenizer, caplog):
    """It cuts the second turn, and leaves nothing of the third one's completion."""
    samples = render_samples(CHATS[0], tokenizer)
    max_length = min(len(samples[1]) - 3, samples[2].prompt_length)
    with caplog.at_level(logging.WARNING, logger="trl_singlepass"):
        ours = single_pass_trainer(tmp_path, tokenizer, CHATS[:1], max_length=max_length)
    lost = len(samples[1]) - max_length + len(samples[2]) - samples[2].prompt_length
    assert f"3 turns of 1 conversation; not trained: {lost} completion tokens past max_length" in caplog.text
    assert "in 1 turn trained in part and 1 turn dropped whole (0 conversations" in caplog.text
    assert_trained_as_stock(ours, tmp_path, tokenizer, expand(CHATS[0]), max_length=max_length)


def test_a_dataset_of_which_nothing_is_left_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"No turn of the train dataset is trained: .*Raise max_length"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, max_length=3)


def test_a_trainer_on_text_evaluates_conversations(tmp_path, tokenizer):
    trainer = single_pass_trainer(tmp_path, tokenizer, [{"text": "plain"}])
    of_conversations = single_pass_trainer(tmp_path, tokenizer, CHATS)
    assert trainer.evaluate(as_dataset(CHATS))["eval_loss"] == pytest.approx(
        of_conversations.evaluate(as_dataset(CHATS))["eval_loss"], abs=1e-6
    )


def test_the_first_step_counts_the_tokens_of_all_its_batches(tmp_path, tokenizer):
    """A model fresh from disk is in evaluation mode until the Trainer's first step has begun."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    trainers = [
        single_pass_trainer(tmp_path, tokenizer, CHATS, float32_model(tokenizer).train(mode), **settings)
        for mode in (True, False)
    ]
    for trainer in trainers:
        trainer.train()
    assert logged(trainers[0], "num_trained_tokens") == logged(trainers[1], "num_trained_tokens")
    assert largest_difference(*trainers) == 0


@pytest.mark.parametrize(
    ("saved", "settings"),
    [(2, {"max_steps": 4}), (len(CHATS), {"num_train_epochs": 2, "max_steps": -1, "ignore_data_skip": True})],
    ids=["in an epoch", "after an epoch, with ignore_data_skip"],
)
def test_a_killed_run_resumes_where_it_was(tmp_path, tokenizer, saved, settings):
    settings = {"save_strategy": "steps", "save_steps": saved, "per_device_train_batch_size": 1, **settings}
    whole = single_pass_trainer(tmp_path / "whole", tokenizer, CHATS, **settings)
    whole.train()
    resumed = single_pass_trainer(tmp_path / "whole", tokenizer, CHATS, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved}"))
    assert largest_difference(whole, resumed) == 0
    assert len(logged(whole, "num_trained_tokens")) > saved
    assert logs(resumed)[:-1] == logs(whole)[:-1]  # the last one is the mean loss since the run began


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("", "of `Qwen3ForCausalLM`"),
        ("{tmp}", "of `{name}`"),
        ("Qwen/Qwen3-0.6B", "of [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B)"),
    ],
)
def test_the_model_card_says_what_was_trained_on_what(tmp_path, tokenizer, source, named):
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS)
    trainer.model.config._name_or_path = source.format(tmp=tmp_path)
    trainer.train()
    trainer.create_model_card(model_name="demo", dataset_name="org/chats")
    card = (tmp_path / "README.md").read_text()
    assert "None" not in card
    assert f"fine-tuned version {named.format(name=tmp_path.name)} on the [org/chats]" in card
    assert "huggingface.co/papers/2504.18246" in card
    assert "- single-pass" in card
    assert f"[trl-singlepass](https://github.com/trl-singlepass/trl-singlepass) {trl_singlepass.__version__}" in card
    assert "- Data: 8 turns of 3 conversations; all " in card
    assert f"- Trained tokens: {logged(trainer, 'num_trained_tokens')[-1]:.10g}\n" in card
    assert f"- Sharing factor: {logged(trainer, 'sharing_factor')[-1]:.10g}\n" in card


def test_preparation_prints_its_summary_once(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("trl_singlepass.data.preparation.logger.isEnabledFor", lambda level: False)
    single_pass_trainer(tmp_path, tokenizer, CHATS, packing=True, max_length=4096)
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train dataset: ")]
    assert len(printed) == 1
    assert "8 turns of 3 conversations; all " in printed[0]
    assert "packed into 1 row of at most 4096 tokens" in printed[0]
    monkeypatch.setattr(SinglePassSFTConfig, "process_index", 1)
    single_pass_trainer(tmp_path, tokenizer, CHATS)
    assert "train dataset: " not in capsys.readouterr().err


def test_training_arguments_and_no_arguments_are_taken(tmp_path, tokenizer, monkeypatch):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, learning_rate=0.3)
    kwargs = {"train_dataset": as_dataset(CHATS), "processing_class": tokenizer}
    trainer = SinglePassSFTTrainer(float32_model(tokenizer), args, **kwargs)
    assert trainer.args.learning_rate == 0.3
    monkeypatch.chdir(tmp_path)
    # TRL's default of bf16 needs to be told when there is no GPU.
    on_cpu = functools.partial(SinglePassSFTConfig, use_cpu=True, report_to="none")
    functools.update_wrapper(on_cpu, SinglePassSFTConfig, updated=())
    monkeypatch.setattr("trl_singlepass.training.config.SinglePassSFTConfig", on_cpu)
    model = float32_model(tokenizer)
    model.config._name_or_path = "somewhere/tiny"
    assert SinglePassSFTTrainer(model, **kwargs).args.output_dir == "tiny-SinglePassSFT"


def test_padding_to_a_multiple_trains_the_same(tmp_path, tokenizer):
    plain = single_pass_trainer(tmp_path, tokenizer, CHATS)
    padded = single_pass_trainer(tmp_path, tokenizer, CHATS, pad_to_multiple_of=64)
    batch = padded.data_collator([padded.train_dataset[0]])
    assert batch["input_ids"].shape[1] % 64 == 0
    plain.train()
    padded.train()
    assert largest_difference(plain, padded) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": False}])
def test_the_defaults_warn_of_nothing_that_a_user_could_not_change(tmp_path, settings):
    """Warnings are errors here, so this fails if TRL's default is still passed on under its old name."""
    if "activation_checkpointing" not in SinglePassSFTConfig.__dataclass_fields__:
        pytest.skip("the old name is the only one before transformers 5.24")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = SinglePassSFTConfig(str(tmp_path), bf16=False, **settings)
    assert config.gradient_checkpointing is config.activation_checkpointing is not bool(settings)
    assert config.dataloader_pin_memory == torch.accelerator.is_available()


def test_the_old_name_of_checkpointing_is_still_read(tmp_path):
    """And warns of itself, where transformers has a new one: this is what a user can change."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = SinglePassSFTConfig(str(tmp_path), bf16=False, gradient_checkpointing=False)
    assert config.gradient_checkpointing is False
    if "activation_checkpointing" in SinglePassSFTConfig.__dataclass_fields__:
        assert config.activation_checkpointing is False
        assert any("Use `activation_checkpointing` instead" in str(one.message) for one in caught)
