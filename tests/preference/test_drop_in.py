"""In the place of TRL's trainer: its signature, and every kind of dataset and reference that its own tests train."""

import copy
import inspect
import json

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS
from support.pairs import SINGLE_TURNS, TRAJECTORIES, dpo_trainer, plain, stock_dpo_trainer
from support.slow import slow_but_for
from support.trainers import SETTINGS, float32_model, logged, parameters
from trl_singlepass import SinglePassDPOTrainer


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def call(a, b):
    function = {"name": "add", "arguments": {"a": a, "b": b}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


# A template that reads an argument of its own, as that of TRL's test does.
SHOUTING = (
    "{% for message in messages %}<|im_start|>{{ message.role | upper if shouting else message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'ASSISTANT' if shouting else 'assistant' }}\n{% endif %}"
)
# What TRL's tests of `DPOTrainer` train, by the name of their datasets.
FORMS = {
    "standard_preference": [
        {"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No idea."} for i in range(4)
    ],
    "standard_implicit_prompt_preference": [
        {"chosen": f"What is {i}? It is {i}.", "rejected": f"What is {i}? No idea."} for i in range(4)
    ],
    "conversational_preference": [
        {"prompt": [user(f"What is {i}?")], "chosen": [answer(f"It is {i}.")], "rejected": [answer("No idea.")]}
        for i in range(4)
    ],
    "conversational_implicit_prompt_preference": [
        {"chosen": [user(f"What is {i}?"), answer("This.")], "rejected": [user(f"What is {i}?"), answer("No idea.")]}
        for i in range(4)
    ],
    "toolcall": [
        {
            "prompt": [user(f"What is {i} + 2?")],
            "chosen": [call(i, 2)],
            "rejected": [answer("No idea.")],
            "tools": json.dumps(TOOLS) if i % 2 else None,
        }
        for i in range(4)
    ],
    "chat_template_kwargs": [
        {**plain(example), "chat_template_kwargs": {"shouting": bool(i % 2)}}
        for i, example in enumerate(SINGLE_TURNS[:4])
    ],
}


def test_the_signature_is_trls():
    ours, theirs = (inspect.signature(a.__init__).parameters for a in (SinglePassDPOTrainer, DPOTrainer))
    assert list(ours) == list(theirs)
    assert all((ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default) for name in theirs)


@pytest.mark.parametrize(
    "form",
    slow_but_for(["chat_template_kwargs"], FORMS),
)
def test_every_form_of_a_pair_trains_as_in_trl(tmp_path, tokenizer, form):
    """One turn each: losses are those of stock DPO, and all parameters move."""
    tokenizer = make_tokenizer(None, SHOUTING) if form == "chat_template_kwargs" else tokenizer
    model, rows = float32_model(tokenizer), FORMS[form]
    settings = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.03}
    both = [make(tmp_path, tokenizer, rows, model, **settings) for make in (stock_dpo_trainer, dpo_trainer)]
    for trainer in both:
        trainer.train()
    stock, ours = (logged(trainer, "loss") for trainer in both)
    assert ours == pytest.approx(stock, rel=1e-4)
    start = dict(model.named_parameters())
    assert not any(torch.equal(value, start[name]) for name, value in parameters(both[1]).items())


EVALUATIONS = {
    "dataset": lambda rows: rows,
    "dataset_dict": lambda rows: datasets.DatasetDict(data1=rows, data2=rows),
    "dict_of_dataset": lambda rows: {"data1": rows, "data2": rows},
    "iterable_dataset": lambda rows: rows.to_iterable_dataset(),
    "iterable_dataset_dict": lambda rows: datasets.IterableDatasetDict(
        data1=rows.to_iterable_dataset(), data2=rows.to_iterable_dataset()
    ),
    "dict_of_iterable_dataset": lambda rows: {
        "data1": rows.to_iterable_dataset(),
        "data2": rows.to_iterable_dataset(),
    },
}


@pytest.mark.parametrize("precomputed", slow_but_for([False], [False, True]))
@pytest.mark.parametrize(
    "kind",
    slow_but_for(["dict_of_iterable_dataset"], EVALUATIONS),
)
def test_raw_datasets_are_evaluated(tmp_path, tokenizer, kind, precomputed):
    make = EVALUATIONS[kind]
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, precompute_ref_log_probs=precomputed)
    rows = make(datasets.Dataset.from_list(TRAJECTORIES))
    if precomputed and "iterable" in kind:
        with pytest.raises(ValueError, match=r"precompute_ref_log_probs.*not supported with IterableDataset"):
            trainer.evaluate(rows)
        return
    metrics = trainer.evaluate(rows)
    losses = [value for name, value in metrics.items() if name.endswith("loss")]
    assert len(losses) == (2 if "dict" in kind else 1)
    expected = trainer.evaluate(datasets.Dataset.from_list(TRAJECTORIES))["eval_loss"]
    assert losses == pytest.approx([expected] * len(losses), rel=1e-6)


@pytest.mark.slow
def test_there_is_no_reference_for_new_pairs_once_the_policy_has_moved(tmp_path, tokenizer):
    rows, model = datasets.Dataset.from_list(TRAJECTORIES), float32_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = DPOConfig(str(tmp_path), **SETTINGS, precompute_ref_log_probs=True)
    trainer = SinglePassDPOTrainer(str(tmp_path / "model"), args=args, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate(rows)["eval_loss"] is not None
    trainer.train()
    assert trainer.evaluate()["eval_loss"] is not None
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to"):
        trainer.evaluate(rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
def test_adapters_train_and_the_base_stays(tmp_path, tokenizer, family, wrapped):
    model = float32_model(tokenizer, family)
    before = copy.deepcopy(dict(model.named_parameters()))
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    policy = get_peft_model(model, config) if wrapped else model
    kwargs = {} if wrapped else {"peft_config": config}
    settings = {"max_steps": 2, "activation_checkpointing": True}  # B is 0 at first, and so is the gradient of A
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, policy, None, kwargs, **settings)
    start = {name: value.detach().clone() for name, value in parameters(trainer).items()}
    trainer.train()
    moved = {name for name, value in parameters(trainer).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "lora_" in name and ".ref." not in name}
    base = {name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in start.items()}
    assert all(torch.equal(before[name], base[name]) for name in before)


def test_models_are_tagged(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS[:1])
    assert {"trl", "dpo", "single-pass"} <= set(trainer.model.model_tags)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        SinglePassDPOTrainer(float32_model(tokenizer), args=DPOConfig(str(tmp_path), bf16=False))
