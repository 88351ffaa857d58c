"""Pairs of a single turn move parameters as stock `DPOTrainer` does; several turns, as the served contexts say."""

import copy
import itertools

import datasets
import pytest
from peft import LoraConfig

from support.conversations import TOOLS, chat, tool_chat
from support.pairs import (
    SINGLE_TURNS,
    adapted_model,
    dpo_trainer,
    pair,
    plain,
    stock_dpo_trainer,
)
from support.slow import slow_but_for
from support.trainers import float32_model, largest_difference, logged, parameters


TOLERANCE = 1e-6
STEPS = {"max_steps": 20, "learning_rate": 0.02, "max_grad_norm": 1.0}

# Stock training gives these as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")
LOGGED = (
    *("loss", "grad_norm", "entropy", "num_tokens", "mean_token_accuracy", "logits/chosen", "logits/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
)


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


def train_both(tmp_path, tokenizer, model, pairs=SINGLE_TURNS, ref_model="perturbed", **settings):
    """Train copies of a model both ways; return the trainers."""
    settings = {**STEPS, **settings}
    both = [
        make(tmp_path, tokenizer, pairs, model, copy.deepcopy(ref_model), **settings)
        for make in (stock_dpo_trainer, dpo_trainer)
    ]
    for trainer in both:
        trainer.train()
    return both


def assert_equal(stock, single_pass, start, tolerance=TOLERANCE, least_move=1000, keys=LOGGED):
    """Assert that both trained and logged alike, and that they moved far more than the tolerance."""
    assert largest_difference(stock, single_pass) <= tolerance
    moved = max(float((parameters(stock)[name] - value).abs().max()) for name, value in start.items())
    assert moved > least_move * tolerance
    for key in keys:
        assert logged(single_pass, key) == pytest.approx(logged(stock, key), rel=1e-3, abs=1e-4), key


def start_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "precomputed"),
    slow_but_for([(1, 2, True)], itertools.product((1, 4), (1, 2), (False, True))),
)
def test_twenty_steps(tmp_path, tokenizer, batch_size, accumulation, precomputed):
    model = float32_model(tokenizer)
    both = train_both(
        tmp_path,
        tokenizer,
        model,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        precompute_ref_log_probs=precomputed,
    )
    assert both[1].state.global_step == 20
    assert_equal(*both, start_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_twenty_steps_with_an_adapter_as_its_own_reference(tmp_path, tokenizer, batch_size, accumulation, precomputed):
    model = adapted_model(tokenizer)
    both = train_both(
        tmp_path,
        tokenizer,
        model,
        ref_model=None,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        precompute_ref_log_probs=precomputed,
    )
    trained = {name: value for name, value in start_of(both[0].model).items() if ".default." in name}
    assert trained
    start = {name: start_of(model)[name] for name in trained}
    assert largest_difference(*both) <= TOLERANCE
    assert max(float((trained[name] - start[name]).abs().max()) for name in trained) > 1000 * TOLERANCE


def test_a_new_adapter_is_trained_against_the_model_without_it(tmp_path, tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    kwargs = {"peft_config": config}
    both = train_both(
        tmp_path, tokenizer, float32_model(tokenizer), ref_model=None, per_device_train_batch_size=2, kwargs=kwargs
    )
    assert largest_difference(*both) <= TOLERANCE
    assert logged(both[1], "rewards/margins") == pytest.approx(logged(both[0], "rewards/margins"), abs=1e-4)


KEPT = {
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "use_weighting": {"use_weighting": True, "learning_rate": 1.0},
    "ld_alpha": {"ld_alpha": 0.5},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4},
    "max_length": {"max_length": 60},
}


@pytest.mark.parametrize("name", slow_but_for(["ld_alpha", "sync_ref_model", "max_length"], KEPT))
def test_settings_keep_their_meaning(tmp_path, tokenizer, name):
    model = float32_model(tokenizer)
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, **KEPT[name]}
    assert_equal(*train_both(tmp_path, tokenizer, model, **settings), start_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_row_tokens": 160},
    ],
    ids=["reentrant", "non-reentrant", "compiled", "compiled in rows"],
)
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_layers_that_run_again_or_are_compiled(tmp_path, tokenizer, monkeypatch, adapted, settings):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # transformers changes it, for all later trainers
    model = adapted_model(tokenizer) if adapted else float32_model(tokenizer)
    reference = None if adapted else "perturbed"
    steps = {**STEPS, "max_steps": 3, "per_device_train_batch_size": 3}
    stock = stock_dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS, model, copy.deepcopy(reference), **steps)
    single_pass = dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS, model, reference, **steps, **settings)
    start = start_of(stock.model)
    for trainer in (stock, single_pass):
        trainer.train()
    assert_equal(stock, single_pass, start)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains_as_in_trl(tmp_path, tokenizer, loss_type):
    """Pairs of several kinds in one batch: long and short, with and without reasoning, a system message, tools."""
    model = float32_model(tokenizer)
    settings = {"loss_type": loss_type, "label_smoothing": 0.1, "max_steps": 6, "per_device_train_batch_size": 4}
    both = train_both(tmp_path, tokenizer, model, ONE_OF_EACH_KIND, **settings)
    keys = [key for key in LOGGED if key != "rewards/accuracies"]  # one of the margins is as good as 0
    assert_equal(*both, start_of(model), least_move=50, keys=keys)


@pytest.mark.parametrize(
    ("adapted", "settings"),
    [
        (False, {"max_row_tokens": 160}),
        *(
            pytest.param(adapted, settings, marks=pytest.mark.slow)
            for adapted in (False, True)
            for settings in [
                {"max_row_tokens": 160, "activation_checkpointing_kwargs": {"use_reentrant": True}},
                {"max_row_tokens": 160, "activation_checkpointing_kwargs": {"use_reentrant": False}},
                {"wave_tokens": 50, "activation_checkpointing_kwargs": {"use_reentrant": True}},
                {"wave_tokens": 50, "activation_checkpointing_kwargs": {"use_reentrant": False}},
                {"wave_tokens": "auto"},
            ]
        ),
    ],
    ids=str,
)
def test_batches_in_parts(tmp_path, tokenizer, adapted, settings):
    """A step is the mean over its pairs, however many of them share a row, and however many waves a row has."""
    model = adapted_model(tokenizer) if adapted else float32_model(tokenizer)
    reference = None if adapted else "perturbed"
    steps = {**STEPS, "max_steps": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    stock = stock_dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS, model, copy.deepcopy(reference), **steps)
    in_parts = dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS, model, reference, **settings, **steps)
    start = start_of(stock.model)
    for trainer in (stock, in_parts):
        trainer.train()
    assert_equal(stock, in_parts, start)
    if settings.get("wave_tokens") != "auto":
        assert logged(in_parts, "num_rows" if "max_row_tokens" in settings else "num_waves")[0] > 1


def test_auxiliary_loss_of_a_mixture_of_experts(tmp_path, tokenizer):
    model = float32_model(tokenizer, "qwen3-moe")
    both = train_both(tmp_path, tokenizer, model, per_device_train_batch_size=4, max_steps=3)
    assert_equal(*both, start_of(model))
    assert logged(both[1], "aux_loss") == pytest.approx(logged(both[0], "aux_loss"), rel=1e-5)


@pytest.mark.parametrize(
    "pairs",
    [
        [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No."} for i in range(4)],
        [{"prompt_ids": [5 + i], "chosen_ids": [8, 9], "rejected_ids": [9, 9, 8]} for i in range(4)],
    ],
    ids=["text", "tokens"],
)
def test_pairs_without_messages(tmp_path, tokenizer, pairs):
    """Stock tokenises again what has been tokenised, and fails: it gets the text that the tokens are."""
    model, settings = float32_model(tokenizer), {**STEPS, "max_steps": 4, "per_device_train_batch_size": 2}
    single_pass = dpo_trainer(tmp_path, tokenizer, pairs, model, **settings)
    if "prompt_ids" in pairs[0]:
        stock = stock_dpo_trainer(tmp_path, tokenizer, SINGLE_TURNS[:4], model, **settings)
        stock.train_dataset = type(stock.train_dataset).from_list(pairs)
    else:
        stock = stock_dpo_trainer(tmp_path, tokenizer, pairs, model, **settings)
    for trainer in (stock, single_pass):
        trainer.train()
    assert_equal(stock, single_pass, start_of(model))


def test_evaluation(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    both = []
    for make in (stock_dpo_trainer, dpo_trainer):
        trainer = make(tmp_path, tokenizer, SINGLE_TURNS[:5], model, per_device_eval_batch_size=2)
        both.append(trainer.evaluate(datasets.Dataset.from_list(SINGLE_TURNS[5:])))
    stock, single_pass = both
    for key in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_logps/chosen"):
        assert single_pass[key] == pytest.approx(stock[key], rel=1e-4, abs=1e-5), key
