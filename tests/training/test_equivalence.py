"""Training in a single pass moves parameters as stock `SFTTrainer` does on the expanded samples."""

import itertools

import pytest
import torch
import trl
from packaging.version import Version

from support.paired_trainers import CONVERSATIONS, adapted, train_both
from support.slow import slow_but_for
from support.tiny_models import tiny_model
from support.trainers import float32_model, largest_difference, logged, parameters


TOLERANCE = 1e-6
# What reads logits fails with the default loss before TRL 1.15, in stock training too.
WITH_LOGITS = {} if Version(trl.__version__) >= Version("1.15") else {"loss_type": "nll"}

# Stock training gives these as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def assert_equal(stock, single_pass, start, tolerance=TOLERANCE):
    """Assert that both trained alike, and that they moved far more than the tolerance."""
    assert largest_difference(stock, single_pass) <= tolerance
    moved = max(float((parameter - start[name]).abs().max()) for name, parameter in parameters(stock).items())
    assert moved > 1000 * tolerance
    for key in ("loss", "grad_norm"):
        assert logged(single_pass, key) == pytest.approx(logged(stock, key), rel=1e-4)


def start_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Each two of these settings meet in a fast test.
PAIRWISE = [(1, 1, False, False), (1, 2, True, True), (4, 1, True, False), (4, 2, False, False), (4, 1, False, True)]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "checkpointing", "lora"),
    slow_but_for(PAIRWISE, itertools.product((1, 4), (1, 2), (False, True), (False, True))),
)
def test_one_step(tmp_path, tokenizer, batch_size, accumulation, checkpointing, lora):
    model = float32_model(tokenizer)
    model = adapted(model) if lora else model
    both = train_both(
        tmp_path,
        tokenizer,
        model,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    assert_equal(*both, start_of(model))


def test_one_step_with_reentrant_checkpointing(tmp_path, tokenizer):
    """TRL's default is the other kind."""
    model = float32_model(tokenizer)
    kwargs = {"use_reentrant": True}
    both = train_both(tmp_path, tokenizer, model, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert_equal(*both, start_of(model))


def test_twenty_steps(tmp_path, tokenizer):
    model = float32_model(tokenizer)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4, "max_grad_norm": 1.0}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    both = train_both(tmp_path, tokenizer, model, max_steps=20, **settings)
    assert both[1].state.global_step == 20
    assert_equal(*both, start_of(model))


OTHER_FAMILIES = ["gpt-oss", "gemma2", "gemma3", "mistral-sliding"]


# Not Llama 4: TRL's fused head takes the wrong part of it for the decoder, in stock training too.
@pytest.mark.parametrize("family", slow_but_for(["gpt-oss", "gemma3"], OTHER_FAMILIES))
def test_one_step_of_other_families(tmp_path, tokenizer, family):
    model = tiny_model(family, len(tokenizer), torch.float32, attn_implementation="eager", initializer_range=0.05)
    assert_equal(*train_both(tmp_path, tokenizer, model, per_device_train_batch_size=4), start_of(model))


def test_auxiliary_loss_of_a_mixture_of_experts(tmp_path, tokenizer):
    model = float32_model(tokenizer, "qwen3-moe")
    both = train_both(
        tmp_path, tokenizer, model, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2
    )
    assert_equal(*both, start_of(model))
    assert logged(both[1], "aux_loss") == pytest.approx(logged(both[0], "aux_loss"), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    # DFT scales gradients by the probability of the target, small here: a larger step makes up for it.
    [
        {"loss_type": "nll"},
        {"loss_type": "dft", "learning_rate": 10.0},
        {"label_smoothing_factor": 0.1, **WITH_LOGITS},
    ],
    ids=["nll", "dft", "label_smoothing"],
)
def test_losses_and_evaluation(tmp_path, tokenizer, settings):
    model = float32_model(tokenizer)
    both = train_both(
        tmp_path,
        tokenizer,
        model,
        evaluation=CONVERSATIONS[:5],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        **settings,
    )
    assert_equal(*both, start_of(model))
    for key in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(both[1], key) == pytest.approx(logged(both[0], key), rel=1e-4)
    stock, single_pass = (trainer.evaluate()["eval_loss"] for trainer in both)
    assert single_pass == pytest.approx(stock, rel=1e-5)
