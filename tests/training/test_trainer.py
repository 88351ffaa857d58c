"""The trainer as a drop-in replacement: every kind of dataset, logs, resuming, the model card."""

import functools
import logging
import warnings

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments

import trl_singlepass
from support.conversations import chat, expand, tool_chat
from support.trainers import (
    SETTINGS,
    as_dataset,
    float32_model,
    largest_difference,
    logged,
    logs,
    needs_weighted_loss,
    parameters,
    single_pass_trainer,
    stock_trainer,
)
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer, render_samples
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row
from trl_singlepass.trees.sample import Sample


pytestmark = pytest.mark.filterwarnings(
    # Deprecations of TRL and transformers that a user who sets these arguments sees in stock training as well.
    "ignore:.*(is|are) deprecated.*:FutureWarning",
)
CHATS = [chat(3), chat(2, seed=1), tool_chat()]


def equals_stock(tmp_path, tokenizer, ours, theirs, **settings):
    one, other = (
        make(tmp_path, tokenizer, rows, per_device_train_batch_size=len(rows), **settings)
        for make, rows in ((single_pass_trainer, ours), (stock_trainer, theirs))
    )
    one.train()
    other.train()
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), abs=1e-6)
    return largest_difference(one, other) < 1e-6


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "plain text"}, {"text": "more of it"}],
        [{"prompt": "a question", "completion": " an answer"}],
        [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}],
    ],
    ids=["text", "plain prompt and completion", "tokenised"],
)
def test_rows_that_are_no_conversations_train_as_in_stock(tmp_path, tokenizer, rows):
    assert equals_stock(tmp_path, tokenizer, rows, rows)


def test_of_a_prompt_and_completion_only_the_completion_is_trained(tmp_path, tokenizer):
    messages = chat(3)
    rows = [{"prompt": messages[:3], "completion": messages[3:]}]
    expanded = [row for row in expand(messages) if len(row["prompt"]) >= 3]
    assert len(expanded) == 2
    assert equals_stock(tmp_path, tokenizer, rows, expanded)


def test_sharegpt_conversations_train_as_messages(tmp_path, tokenizer):
    conversations = [
        {"from": "human", "value": "One?"},
        {"from": "gpt", "value": "<think>\nOne.\n</think>\n\nOne."},
        {"from": "human", "value": "Two?"},
        {"from": "gpt", "value": "<think>\nTwo.\n</think>\n\nTwo."},
    ]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[m["from"]], "content": m["value"]} for m in conversations]
    assert equals_stock(tmp_path, tokenizer, [{"conversations": conversations}], expand(messages))


def test_streamed_conversations_train_as_stored_ones(tmp_path, tokenizer):
    stored = single_pass_trainer(tmp_path, tokenizer, CHATS, per_device_train_batch_size=1, max_steps=3)
    streamed = single_pass_trainer(
        tmp_path, tokenizer, as_dataset(CHATS).to_iterable_dataset(), per_device_train_batch_size=1, max_steps=3
    )
    for trainer in (stored, streamed):
        # A stream cannot be shuffled as a whole.
        trainer.args.train_sampling_strategy = "sequential"
        trainer.train()
    assert sorted(logged(streamed, "num_tokens")) == logged(streamed, "num_tokens")
    assert logged(streamed, "num_trained_tokens")[-1] == logged(stored, "num_trained_tokens")[-1]


def cutting_length(samples):
    """A length that cuts the second turn and leaves nothing of the third one's completion."""
    return min(len(samples[1]) - 3, samples[2].prompt_length)


def test_max_length_trains_what_stock_trains_on_truncated_samples(tmp_path, tokenizer, caplog):
    samples = render_samples(CHATS[0], tokenizer)
    max_length = cutting_length(samples)
    assert equals_stock(tmp_path, tokenizer, CHATS[:1], expand(CHATS[0]), max_length=max_length)


def test_what_max_length_takes_is_counted_in_the_log(tmp_path, tokenizer, caplog):
    samples = render_samples(CHATS[0], tokenizer)
    max_length = cutting_length(samples)
    lost = len(samples[1]) - max_length + len(samples[2]) - samples[2].prompt_length
    with caplog.at_level(logging.WARNING), transformers_logs_propagate():
        single_pass_trainer(tmp_path, tokenizer, CHATS[:1], max_length=max_length)
    assert f"3 turns of 1 conversation; not trained: {lost} completion tokens past max_length" in caplog.text
    assert "in 1 turn trained in part and 1 turn dropped whole (0 conversations" in caplog.text


def test_a_dataset_of_which_nothing_is_left_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"No turn of the train dataset is trained: .*Raise max_length"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, max_length=3)


class transformers_logs_propagate:
    """The loggers of transformers do not reach pytest's handler by default."""

    def __enter__(self):
        self.logger = logging.getLogger("trl_singlepass")
        self.level = self.logger.level
        self.logger.setLevel(logging.WARNING)

    def __exit__(self, *_):
        self.logger.setLevel(self.level)


def test_evaluation_loss_is_pooled_over_the_set_whatever_the_batch_size(tmp_path, tokenizer):
    expanded = [row for messages in CHATS for row in expand(messages)]
    stock = stock_trainer(tmp_path, tokenizer, expanded, per_device_eval_batch_size=len(expanded))
    expected = stock.evaluate(as_dataset(expanded))["eval_loss"]
    for batch_size in (1, 2, 3):
        trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, per_device_eval_batch_size=batch_size)
        assert trainer.evaluate(as_dataset(CHATS))["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_a_trainer_on_text_evaluates_conversations(tmp_path, tokenizer):
    trainer = single_pass_trainer(tmp_path, tokenizer, [{"text": "plain"}])
    of_conversations = single_pass_trainer(tmp_path, tokenizer, CHATS)
    assert trainer.evaluate(as_dataset(CHATS))["eval_loss"] == pytest.approx(
        of_conversations.evaluate(as_dataset(CHATS))["eval_loss"], abs=1e-6
    )


@needs_weighted_loss  # older releases hand no logits to `compute_metrics`
def test_compute_metrics_sees_each_target_beside_its_prediction(tmp_path, tokenizer):
    expanded = [row for messages in CHATS for row in expand(messages)]

    def accuracy(prediction):
        labels = prediction.label_ids[:, 1:]
        hits = (prediction.predictions[:, :-1].argmax(-1) == labels)[labels != -100]
        return {"accuracy": float(hits.mean()), "targets": int((labels != -100).sum())}

    results = [
        make(tmp_path, tokenizer, rows, per_device_eval_batch_size=8, kwargs={"compute_metrics": accuracy}).evaluate(
            as_dataset(rows)
        )
        for make, rows in ((single_pass_trainer, CHATS), (stock_trainer, expanded))
    ]
    assert results[0]["eval_targets"] == results[1]["eval_targets"]
    assert results[0]["eval_accuracy"] == pytest.approx(results[1]["eval_accuracy"])


def test_the_log_tells_sharing_factor_and_trained_tokens(tmp_path, tokenizer):
    samples = [render_samples(messages, tokenizer) for messages in CHATS]
    trees = [PrefixTree.from_samples(of_one) for of_one in samples]
    trainer = single_pass_trainer(
        tmp_path, tokenizer, CHATS, per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=2
    )
    trainer.train()
    trained = sum(float(sample.loss_weights.sum()) for of_one in samples for sample in of_one)
    assert logged(trainer, "num_trained_tokens") == [trained, 2 * trained]
    sharing = sum(tree.num_sample_tokens for tree in trees) / sum(len(tree) for tree in trees)
    assert logged(trainer, "sharing_factor") == pytest.approx([sharing, sharing])


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


def weighted_samples():
    history = [5, 6, 7, 8]
    return [
        Sample([*history, 9, 10], [0, 0, 0, 0, 0.25, 0.5], 4),
        Sample([*history, 9, 11], [0, 0, 0, 0, 0.0625, 0], 4),
    ]


@needs_weighted_loss
@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_weights_reach_loss_and_gradients(tmp_path, tokenizer, accumulation):
    """Their sum is below 1, which stock TRL would clamp; the same rows twice give the same mean."""
    samples = weighted_samples()
    model = float32_model(tokenizer)
    expected = npass_loss_and_gradients(model, samples)
    rows = [Row.from_tree(PrefixTree.from_samples(samples)).columns() for _ in range(accumulation)]
    trainer = single_pass_trainer(
        tmp_path,
        tokenizer,
        datasets.Dataset.from_list([{name: column.tolist() for name, column in row.items()} for row in rows]),
        model=model,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )
    before = parameters(trainer)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected.loss], abs=1e-6)
    assert logged(trainer, "num_trained_tokens") == [0.8125 * accumulation]
    for name, after in parameters(trainer).items():
        gradient = (before[name] - after) / SETTINGS["learning_rate"]
        torch.testing.assert_close(gradient, expected.gradients[name], rtol=0, atol=2e-6)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(
        npass_loss_and_gradients(trainer.model, samples).loss, abs=1e-5
    )


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


def test_lora_trains_the_adapter_only(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, model, kwargs={"peft_config": LoraConfig(r=4)})
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert len(after) > len(frozen)


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
