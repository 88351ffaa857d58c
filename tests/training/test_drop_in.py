"""In the place of TRL's trainer: its signature, its arguments, and every kind of dataset that its own tests train."""

import inspect
import itertools
import logging
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, expand, tool_chat
from support.slow import slow_but_for
from support.small_files import write_model
from support.trainers import (
    SETTINGS,
    as_dataset,
    float32_model,
    largest_difference,
    logged,
    needs_weighted_loss,
    single_pass_trainer,
    stock_trainer,
)
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer


TEXT = [{"text": "plain text"}, {"text": "more of it"}, {"text": "and more"}]
CHATS = [chat(3), chat(2, seed=1), tool_chat()]


@pytest.fixture
def log(caplog):
    logging.Logger.warning_once.cache_clear()
    caplog.set_level(logging.INFO, logger="trl_singlepass")
    return caplog


def test_every_argument_is_taken_by_position(tmp_path, tokenizer):
    """In the order of TRL, with a value that can be told from the default."""
    model = float32_model(tokenizer)
    given = {
        "model": model,
        "args": SinglePassSFTConfig(str(tmp_path), **SETTINGS),
        "data_collator": None,
        "train_dataset": as_dataset(CHATS),
        "eval_dataset": as_dataset(CHATS[:1]),
        "processing_class": tokenizer,
        "compute_loss_func": None,
        "compute_metrics": lambda prediction: {"rows": len(prediction.label_ids)},
        "callbacks": [transformers.TrainerCallback()],
        "optimizers": (torch.optim.SGD(model.parameters(), lr=0.5), None),
        "optimizer_cls_and_kwargs": None,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "quantization_config": None,
        "peft_config": None,
        "formatting_func": None,
    }
    names = list(inspect.signature(SFTTrainer.__init__).parameters)[1:]
    trainer = SinglePassSFTTrainer(*(given[name] for name in names))
    trainer.train()
    assert trainer.args is given["args"]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert given["callbacks"][0] in trainer.callback_handler.callbacks
    assert trainer.evaluate()["eval_rows"] == 1


@dataclass
class ConfigOfTheirs(SFTConfig):
    my_field: int = 3


@dataclass
class ConfigOfOurs(SinglePassSFTConfig):
    my_field: int = 3


@pytest.mark.parametrize("config", [SFTConfig, ConfigOfTheirs, SinglePassSFTConfig, ConfigOfOurs])
def test_the_arguments_stay_the_object_that_was_given(tmp_path, tokenizer, config):
    args = config(str(tmp_path), **{**SETTINGS, "max_length": None, "assistant_only_loss": True})
    before = {name: value for name, value in vars(args).items() if name != "accelerator_config"}
    trainer = SinglePassSFTTrainer(
        float32_model(tokenizer), args, train_dataset=as_dataset(CHATS), processing_class=tokenizer
    )
    assert trainer.args is args
    assert type(args) is config
    assert getattr(args, "my_field", 3) == 3
    assert {name: getattr(args, name) for name in before} == before  # `assistant_only_loss` among them
    args.max_steps = 2
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_sft_config_of_trl_may_carry_settings_of_a_single_pass(tmp_path, tokenizer):
    args = SFTConfig(str(tmp_path), **{**SETTINGS, "max_length": None})
    args.max_row_tokens = 100
    trainer = SinglePassSFTTrainer(
        float32_model(tokenizer), args, train_dataset=as_dataset(CHATS), processing_class=tokenizer
    )
    assert max(map(len, trainer.train_dataset["input_ids"])) <= 100
    assert len(trainer.train_dataset) > len(CHATS)


def test_fields_that_would_be_dropped_are_refused(tmp_path, tokenizer):
    @dataclass
    class Plain(TrainingArguments):
        my_field: int = 3

    args = Plain(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"Plain has fields that SFTConfig does not have: my_field\. Derive"):
        SinglePassSFTTrainer(float32_model(tokenizer), args, train_dataset=as_dataset(CHATS))


@pytest.mark.parametrize("rows", [CHATS, [{"text": "one two three " * 900}] * 2], ids=["conversations", "text"])
@pytest.mark.parametrize("setting", ["packing", "eval_packing"])
def test_packing_alone_takes_the_length_of_trl(tmp_path, tokenizer, log, rows, setting):
    rows = [chat(40, seed=seed) for seed in range(3)] if rows is CHATS else rows
    kwargs = {"eval_dataset": as_dataset(rows)}
    trainer = single_pass_trainer(tmp_path, tokenizer, rows, kwargs=kwargs, **{setting: True})
    packed = trainer.train_dataset if setting == "packing" else trainer.eval_dataset
    lengths = list(map(len, packed["input_ids"]))
    assert 900 < max(lengths) <= 1024
    assert log.text.count("Packing without max_length or max_row_tokens: rows hold 1024 tokens, TRL's default") == 1
    if setting == "eval_packing":
        assert max(map(len, trainer.train_dataset["input_ids"])) > 1024


def as_lines(example):
    return "\n".join(f"{message['role']}: {message['content']}" for message in example["messages"])


def test_formatting_func_trains_text_and_says_so(tmp_path, tokenizer, log):
    rows = [chat(2, seed=seed) for seed in range(3)]
    kwargs = {"formatting_func": as_lines, "eval_dataset": as_dataset(rows)}
    ours = single_pass_trainer(tmp_path, tokenizer, rows, kwargs=kwargs)
    text = [{"text": as_lines({"messages": row})} for row in rows]
    stock = stock_trainer(tmp_path, tokenizer, text, kwargs={"eval_dataset": as_dataset(text)})
    assert log.text.count("formatting_func makes plain text of the conversations") == 2  # of both datasets
    for trainer in (ours, stock):
        trainer.train()
    assert logged(ours, "loss") == logged(stock, "loss")
    assert largest_difference(ours, stock) == 0
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]


def test_formatting_func_has_to_return_text(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"formatting_func returned list, and text \(str\) was expected"):
        single_pass_trainer(
            tmp_path, tokenizer, CHATS, kwargs={"formatting_func": lambda example: example["messages"]}
        )


SINGLE_TURNS = [expand(chat(1, seed=seed))[0] for seed in range(3)]
FORMATS = {
    "language modelling": TEXT,
    "prompt and completion": [{"prompt": "a question", "completion": " an answer"}] * 3,
    "conversational prompt and completion": SINGLE_TURNS,
    "tokenised": [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 3,
    "tokenised, with a mask": [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 0]}] * 3,
}
DEFAULT = [(name, None) for name in FORMATS] + [("tokenised", "bfd")]


@pytest.mark.parametrize(
    ("format_of_rows", "packing"),
    slow_but_for(DEFAULT, itertools.product(FORMATS, (None, "bfd", "wrapped"))),
)
@pytest.mark.parametrize("is_stream", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stored", "stream"])
def test_what_has_one_turn_trains_as_in_stock(tmp_path, tokenizer, format_of_rows, is_stream, packing):
    rows = FORMATS[format_of_rows]
    if packing == "wrapped" and rows is SINGLE_TURNS:
        pytest.skip("refused for conversations")
    settings = {"packing": True, "packing_strategy": packing, "max_length": 200} if packing else {}
    dataset = as_dataset(rows).to_iterable_dataset() if is_stream else as_dataset(rows)
    trainers = [
        make(tmp_path, tokenizer, dataset, per_device_train_batch_size=3, max_steps=2, **settings)
        for make in (single_pass_trainer, stock_trainer)
    ]
    for trainer in trainers:
        trainer.train()
    assert logged(trainers[0], "loss") == pytest.approx(logged(trainers[1], "loss"), abs=1e-5)
    assert largest_difference(*trainers) < 1e-5


@pytest.mark.parametrize("is_stream", [False, True], ids=["stored", "stream"])
def test_evaluation_sets_may_be_several_and_of_different_kinds(tmp_path, tokenizer, is_stream):
    sets = {"chats": as_dataset(CHATS), "text": as_dataset(TEXT)}
    if is_stream:
        sets = {name: dataset.to_iterable_dataset() for name, dataset in sets.items()}
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, kwargs={"eval_dataset": sets}, eval_strategy="steps")
    trainer.train()
    expanded = [row for messages in CHATS for row in expand(messages)]
    for name, rows in (("chats", expanded), ("text", TEXT)):
        stock = stock_trainer(tmp_path, tokenizer, rows, trainer.model, per_device_eval_batch_size=len(rows))
        expected = stock.evaluate(as_dataset(rows))["eval_loss"]
        assert logged(trainer, f"eval_{name}_loss") == pytest.approx([expected], abs=1e-6)


def predictions(trainer, rows):
    """Per example, the trained tokens and the likeliest ones beside them."""
    raw = as_dataset(rows)
    if not isinstance(trainer, SinglePassSFTTrainer):  # TRL's takes only what it has prepared
        raw = trainer._prepare_dataset(raw, trainer.processing_class, trainer.args, False, None, "test")
    output = trainer.predict(raw)
    labels, likeliest = output.label_ids[:, 1:], output.predictions[:, :-1].argmax(-1)
    assert output.predictions.shape[:2] == output.label_ids.shape
    return [
        (row[row != -100].tolist(), best[row != -100].tolist()) for row, best in zip(labels, likeliest, strict=True)
    ]


@needs_weighted_loss  # older releases hand no logits on
@pytest.mark.parametrize(("batch_size", "multiple"), [(1, 64), (2, None), (3, 64)])
def test_predictions_have_one_row_per_example(tmp_path, tokenizer, batch_size, multiple):
    rows = [expand(chat(1, seed=seed))[0] for seed in (0, 2, 1)]
    settings = {"per_device_eval_batch_size": batch_size, "pad_to_multiple_of": multiple}
    ours, theirs = (
        predictions(make(tmp_path, tokenizer, rows, **settings), rows) for make in (single_pass_trainer, stock_trainer)
    )
    assert len(ours) == 3
    assert ours == theirs


@needs_weighted_loss
def test_a_conversation_is_one_row_with_every_trained_token(tmp_path, tokenizer):
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, per_device_eval_batch_size=2)
    stock = stock_trainer(tmp_path, tokenizer, [row for messages in CHATS for row in expand(messages)])
    ours = predictions(trainer, CHATS)
    assert len(ours) == len(CHATS)
    for row, messages in zip(ours, CHATS, strict=True):
        samples = predictions(stock, expand(messages))
        assert sorted(zip(*row, strict=True)) == sorted(
            pair for labels, best in samples for pair in zip(labels, best, strict=True)
        )


@needs_weighted_loss
@pytest.mark.parametrize("rows", [CHATS, TEXT], ids=["conversations", "text"])
def test_a_raw_dataset_is_predicted_in_its_order(tmp_path, tokenizer, rows):
    """Also where training shuffles and packs: a prediction belongs to the example at its position."""
    settings = {"shuffle_dataset": True, "packing": rows is CHATS, "max_length": 4096, "seed": 1}
    trainer = single_pass_trainer(tmp_path, tokenizer, rows, **settings)
    plain = single_pass_trainer(tmp_path, tokenizer, rows, model=trainer.model)
    assert trainer.args.shuffle_dataset
    assert predictions(trainer, rows) == predictions(plain, rows)
    prepared = plain._prepare_dataset(as_dataset(rows), tokenizer, plain.args, False, None, "test")
    assert (trainer.predict(prepared).label_ids == trainer.predict(as_dataset(rows)).label_ids).all()


def test_a_model_by_name_takes_its_arguments(tmp_path, tokenizer):
    model = write_model(tmp_path / "model")
    args = SinglePassSFTConfig(
        str(tmp_path), **SETTINGS, model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"}
    )
    trainer = SinglePassSFTTrainer(model, args, train_dataset=as_dataset(CHATS))
    assert trainer.model.dtype == torch.bfloat16
    trainer.train()
    assert logged(trainer, "loss")


TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '|' + m.content + '<|im_end|>' }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant|' }}{% endif %}"


@pytest.mark.parametrize("kind", ["file", "tokenizer"])
def test_a_chat_template_is_taken_from_its_path(tmp_path, kind):
    own, other = make_tokenizer("qwen3"), make_tokenizer("qwen3", chat_template=TEMPLATE + GENERATION)
    if kind == "file":
        path = tmp_path / "template.jinja"
        path.write_text(other.chat_template)
    else:
        path = tmp_path / "other"
        other.save_pretrained(path)
    rows = [[{"role": "user", "content": "One?"}, {"role": "assistant", "content": "One."}]]
    trainer = single_pass_trainer(tmp_path, own, rows, chat_template_path=str(path))
    text = own.decode(trainer.train_dataset[0]["input_ids"])
    assert text == "<|im_start|>user|One?<|im_end|><|im_start|>assistant|One.<|im_end|>"


def test_a_training_set_is_required(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        single_pass_trainer(tmp_path, tokenizer, None)
