"""Training in a single pass moves parameters as stock `SFTTrainer` does on the expanded samples."""

import itertools

import pytest
import trl
from packaging.version import Version

from support.slow import slow_but_for
from support.trainers import CONVERSATIONS, adapted, assert_trained_alike, float32_model, logged, train_both


# What reads logits fails with the default loss before TRL 1.15, in stock training too.
WITH_LOGITS = {} if Version(trl.__version__) >= Version("1.15") else {"loss_type": "nll"}

# Stock training gives these as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")

# Each two of these settings meet in a fast test.
PAIRWISE = [(1, 1, False, False), (1, 2, True, True), (4, 1, True, False), (4, 2, False, False), (4, 1, False, True)]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "checkpointing", "lora"),
    slow_but_for(PAIRWISE, itertools.product((1, 4), (1, 2), (False, True), (False, True))),
)
def test_one_step(tmp_path, tokenizer, batch_size, accumulation, checkpointing, lora):
    model = float32_model(tokenizer)
    model = adapted(model) if lora else model
    steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    both = train_both(tmp_path, tokenizer, model, gradient_checkpointing=checkpointing, **steps)
    assert_trained_alike(*both, model)


SETTINGS = {
    # TRL's default is the other kind.
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "twenty steps": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(tmp_path, tokenizer, name):
    model = float32_model(tokenizer)
    assert_trained_alike(*train_both(tmp_path, tokenizer, model, **SETTINGS[name]), model)


# Not Llama 4: TRL's fused head takes the wrong part of it for the decoder, in stock training too.
@pytest.mark.parametrize(
    "family", slow_but_for(["gpt-oss", "gemma3"], ["gpt-oss", "gemma2", "gemma3", "mistral-sliding"])
)
def test_one_step_of_other_families(tmp_path, tokenizer, family):
    model = float32_model(tokenizer, family, "eager")
    assert_trained_alike(*train_both(tmp_path, tokenizer, model, per_device_train_batch_size=4), model)


def test_auxiliary_loss_of_a_mixture_of_experts(tmp_path, tokenizer):
    model = float32_model(tokenizer, "qwen3-moe")
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    both = train_both(tmp_path, tokenizer, model, **steps)
    assert_trained_alike(*both, model)
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
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    both = train_both(tmp_path, tokenizer, model, evaluation=CONVERSATIONS[:5], **steps, **settings)
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    assert_trained_alike(*both, model, keys)
    stock, single_pass = (trainer.evaluate()["eval_loss"] for trainer in both)
    assert single_pass == pytest.approx(stock, rel=1e-5)
