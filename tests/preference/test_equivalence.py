"""Pairs of a single turn move parameters as stock `DPOTrainer` does, in every form and with every loss."""

import itertools
import json

import datasets
import pytest
from peft import LoraConfig

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS, call, chat, tool_chat
from support.logs import assistant, user
from support.pairs import SINGLE_TURNS, pair, plain
from support.slow import slow_but_for
from support.trainers import (
    adapted,
    assert_trained_alike,
    dpo_trainer,
    float32_model,
    logged,
    stock_dpo_trainer,
    train_both_on_pairs,
)


STEPS = {"max_steps": 4, "learning_rate": 0.02, "max_grad_norm": 1.0, "per_device_train_batch_size": 2}

LOGGED = (
    *("loss", "grad_norm", "entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
)


def train_both(tmp_path, tokenizer, model, pairs=SINGLE_TURNS, **settings):
    return train_both_on_pairs(tmp_path, tokenizer, model, pairs, **{**STEPS, **settings})


def assert_equal(both, model, keys=LOGGED, least_move=1000):
    assert_trained_alike(*both, model, keys, rel=1e-3, least_move=least_move)


def policy(tokenizer, is_adapted):
    """Return a model, or one with an adapter of which TRL takes a copy as the reference."""
    model = float32_model(tokenizer)
    return adapted(model) if is_adapted else model


@pytest.mark.parametrize(
    ("is_adapted", "batch_size", "accumulation", "precomputed"),
    slow_but_for([(False, 1, 2, True)], itertools.product((False, True), (1, 4), (1, 2), (False, True))),
)
def test_twenty_steps(tmp_path, tokenizer, is_adapted, batch_size, accumulation, precomputed):
    model = policy(tokenizer, is_adapted)
    steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_steps": 20}
    assert_equal(train_both(tmp_path, tokenizer, model, precompute_ref_log_probs=precomputed, **steps), model)


SETTINGS = {
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "use_weighting": {"use_weighting": True, "learning_rate": 1.0},
    "ld_alpha": {"ld_alpha": 0.5},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4},
    "max_length": {"max_length": 60},
    "new adapter": {"kwargs": {"peft_config": LoraConfig(target_modules=["q_proj"], init_lora_weights=False)}},
}


@pytest.mark.parametrize("name", slow_but_for(["ld_alpha", "sync_ref_model", "max_length", "new adapter"], SETTINGS))
def test_settings_keep_their_meaning(tmp_path, tokenizer, name):
    model = float32_model(tokenizer)
    stock, ours = train_both(tmp_path, tokenizer, model, **SETTINGS[name])
    start = stock_dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS, model, **STEPS | SETTINGS[name]).model
    assert_equal((stock, ours), start)


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
REENTRANT, NON_REENTRANT = ({"activation_checkpointing_kwargs": {"use_reentrant": kind}} for kind in (True, False))
OWN = [
    REENTRANT,
    NON_REENTRANT,
    COMPILED,
    {**COMPILED, "max_row_tokens": 160},
    {"max_row_tokens": 160},
    *({**REENTRANT, **part} for part in ({"max_row_tokens": 160}, {"wave_tokens": 50})),
    *({**NON_REENTRANT, **part} for part in ({"max_row_tokens": 160}, {"wave_tokens": 50})),
    {"wave_tokens": "auto"},
]


@pytest.mark.parametrize(
    ("is_adapted", "own"),
    slow_but_for([(False, {"max_row_tokens": 160})], itertools.product((False, True), OWN)),
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_layers_that_run_again_or_are_compiled_and_batches_in_parts(tmp_path, tokenizer, monkeypatch, is_adapted, own):
    """A step is the mean over its pairs, however many of them share a row, and however many waves a row has."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers changes it, for all later trainers
    model = policy(tokenizer, is_adapted)
    steps = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    both = train_both(tmp_path, tokenizer, model, own=own, **steps)
    assert_equal(both, model)
    for setting, count in (("max_row_tokens", "num_rows"), ("wave_tokens", "num_waves")):
        if isinstance(own.get(setting), int):
            assert logged(both[1], count)[0] > 1


def test_auxiliary_loss_of_a_mixture_of_experts(tmp_path, tokenizer):
    model = float32_model(tokenizer, "qwen3-moe")
    both = train_both(tmp_path, tokenizer, model, per_device_train_batch_size=4, max_steps=3)
    assert_equal(both, model)
    assert logged(both[1], "aux_loss") == pytest.approx(logged(both[0], "aux_loss"), rel=1e-5)


def test_evaluation(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    both = []
    for make in (stock_dpo_trainer, dpo_trainer):
        trainer = make(tmp_path, tokenizer, SINGLE_TURNS[:5], model, per_device_eval_batch_size=2)
        both.append(trainer.evaluate(datasets.Dataset.from_list(SINGLE_TURNS[5:])))
    stock, single_pass = both
    for key in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_logps/chosen"):
        assert single_pass[key] == pytest.approx(stock[key], rel=1e-4, abs=1e-5), key


# Losses and forms of pairs -------------------------------------------------------------------------------------------


ONE_OF_EACH_KIND = [
    pair(seed=1),
    plain(pair(seed=2)),
    {"prompt": chat(2, 3)[:-1], "chosen": chat(2, 3)[-1:], "rejected": chat(1, 9)[-1:]},  # with a history
    {"prompt": tool_chat()[:1], "chosen": tool_chat()[1:2], "rejected": chat(1, 4)[-1:], "tools": TOOLS},
]
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains_as_in_trl(tmp_path, tokenizer, loss_type):
    """Pairs of several kinds in one batch: long and short, with and without reasoning, a system message, tools."""
    model = float32_model(tokenizer)
    settings = {"loss_type": loss_type, "label_smoothing": 0.1, "max_steps": 6, "per_device_train_batch_size": 4}
    both = train_both(tmp_path, tokenizer, model, ONE_OF_EACH_KIND, **settings)
    keys = [key for key in LOGGED if key != "rewards/accuracies"]  # one of the margins is as good as 0
    assert_equal(both, model, keys, least_move=50)


# A template that reads an argument of its own, as that of TRL's test does.
SHOUTING = (
    "{% for message in messages %}<|im_start|>{{ message.role | upper if shouting else message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'ASSISTANT' if shouting else 'assistant' }}\n{% endif %}"
)
# What TRL's tests of `DPOTrainer` train, and token ids.
FORMS = {
    "text": lambda i: {"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No idea."},
    "text without a prompt": lambda i: {"chosen": f"What is {i}? It is {i}.", "rejected": f"What is {i}? No idea."},
    "tokens": lambda i: {"prompt_ids": [5 + i], "chosen_ids": [8, 9], "rejected_ids": [9, 9, 8]},
    "messages": lambda i: {
        "prompt": [user(f"What is {i}?")],
        "chosen": [assistant(f"It is {i}.")],
        "rejected": [assistant("No idea.")],
    },
    "messages without a prompt": lambda i: {
        "chosen": [user(f"What is {i}?"), assistant("This.")],
        "rejected": [user(f"What is {i}?"), assistant("No idea.")],
    },
    "tool calls": lambda i: {
        "prompt": [user(f"What is {i} + 2?")],
        "chosen": [assistant("", tool_calls=[call("add", a=i, b=2)])],
        "rejected": [assistant("No idea.")],
        "tools": json.dumps(TOOLS) if i % 2 else None,
    },
    "chat_template_kwargs": lambda i: {**plain(SINGLE_TURNS[i]), "chat_template_kwargs": {"shouting": bool(i % 2)}},
}


@pytest.mark.parametrize("form", slow_but_for(["text", "tokens", "chat_template_kwargs"], FORMS))
def test_every_form_of_a_pair_trains_as_in_trl(tmp_path, tokenizer, form):
    """Stock tokenises again what has been tokenised, and fails: it gets the text that the tokens are."""
    tokenizer = make_tokenizer(None, SHOUTING) if form == "chat_template_kwargs" else tokenizer
    model, rows = float32_model(tokenizer), [FORMS[form](i) for i in range(4)]
    stock = stock_dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS[:4] if form == "tokens" else rows, model, **STEPS)
    if form == "tokens":
        stock.train_dataset = datasets.Dataset.from_list(rows)
    both = stock, dpo_trainer(tmp_path, tokenizer, rows, model, **STEPS)
    for trainer in both:
        trainer.train()
    assert_equal(both, model)
