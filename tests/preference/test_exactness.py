"""Loss and all gradients equal N separate forwards per turn and trajectory, in float64, for every loss of TRL."""

import pytest
import torch
from trl import DPOTrainer
from trl.kernels import ChunkedLogProbFunction

from support.chat_tokenizers import make_tokenizer
from support.float64_comparison import TOLERANCE, gradients_of
from support.pairs import TRAJECTORIES, SeparateForwards, batch_of, dpo_trainer, perturbed, plain
from support.tiny_causal_lms import tiny_model as tiny_model_of_type
from support.tiny_families import tiny_model
from trl_singlepass import render_samples
from trl_singlepass.reference.float64 import ForcedFloat64


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")
LOSSES = {
    **{name: {"loss_types": [name]} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard")},
    **{name: {"loss_types": [name]} for name in ("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft")},
    "sigmoid_norm": {"loss_types": ["sigmoid_norm"]},
    "exo_pair": {"loss_types": ["exo_pair"], "label_smoothing": 1e-3},
    "robust": {"loss_types": ["robust"], "label_smoothing": 0.1},
    "mixture": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.3},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "use_weighting": {"use_weighting": True},
}
# Name -> model, template. All templates strip earlier reasoning, but that of Llama, which keeps the whole history.
FAMILIES = {
    "qwen3": (lambda size: tiny_model("qwen3", size, attn_implementation="sdpa"), "qwen3"),
    "llama": (lambda size: tiny_model("llama", size, attn_implementation="sdpa"), "llama3"),
    "gpt-oss": (lambda size: tiny_model("gpt-oss", size), "gptoss"),
    "qwen3.5": (lambda size: tiny_model_of_type("qwen3_5_text", vocab_size=size), "qwen3_5_think"),
}


class Float64LogProbs(ChunkedLogProbFunction):
    """TRL's fused head with a backward pass in float64; TRL accumulates in float32."""

    @staticmethod
    def backward(ctx, *gradients):
        with ForcedFloat64():
            return ChunkedLogProbFunction.backward(ctx, *gradients)


def small(model):
    """Shrink weights so that sums of log-probabilities stay where losses are curved."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5
    return model


def set_loss(trainer, loss_types=("sigmoid",), loss_weights=None, **settings):
    """Choose a loss of a trainer that is there already: making one takes longer than its loss."""
    defaults = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False, "label_smoothing": 0.0}
    trainer.loss_types, trainer.loss_weights = list(loss_types), loss_weights or [1.0] * len(loss_types)
    for name, value in {**defaults, **settings}.items():
        setattr(trainer, name, value)


def samples_of(pairs, tokenizer):
    """Return the turns after the prompt of each trajectory, the chosen ones of all pairs first."""
    trajectories = []
    for side in ("chosen", "rejected"):
        for each in pairs:
            turns = render_samples(each["prompt"] + each[side], tokenizer)
            trajectories.append([turn for turn in turns if turn.message_index >= len(each["prompt"])])
    return trajectories


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A trainer in float64, its batch, and the two models with their separate forwards."""
    make_model, template = FAMILIES[request.param]
    tokenizer = make_tokenizer(template)
    pairs = list(map(plain, TRAJECTORIES)) if template == "llama3" else TRAJECTORIES
    model = small(make_model(len(tokenizer)))
    reference = perturbed(model, scale=0.01)
    patch = pytest.MonkeyPatch()
    patch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Float64LogProbs)
    # Weights of WPO need one more output of the head, which the trainer asks for when it is made.
    trainer = dpo_trainer(
        tmp_path_factory.mktemp("out"),
        tokenizer,
        pairs,
        model,
        reference,
        gradient_checkpointing=False,
        use_weighting=True,
        per_device_train_batch_size=len(pairs),
    )
    trajectories = samples_of(pairs, tokenizer)
    separate = SeparateForwards(model, trajectories)
    reference = SeparateForwards(perturbed(model, scale=0.01), trajectories)
    with ForcedFloat64():
        batch = batch_of(trainer)
    yield trainer, batch, separate, reference
    patch.undo()


def expected_loss(trainer, separate, reference):
    """TRL's own loss of N separate forwards; the reference's outputs are read from the batch."""
    batch = separate.batch()
    with torch.no_grad():
        logps = DPOTrainer.compute_ref_log_probs(trainer, reference, batch)
    batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))
    with trainer._reading_reference():
        return DPOTrainer._compute_loss(trainer, separate, batch, return_outputs=False)


# All losses of one family always, one loss of the others; what is TRL's own code does not depend on the family.
CASES = [
    pytest.param(family, name, marks=() if family == "llama" or name == "sigmoid" else pytest.mark.slow)
    for family in FAMILIES
    for name in LOSSES
]


@pytest.mark.parametrize(("case", "name"), CASES, indirect=["case"])
def test_loss_and_gradients_equal_separate_forwards(case, name):
    trainer, batch, separate, reference = case
    set_loss(trainer, **LOSSES[name])
    separate.model.zero_grad()
    trainer.model.zero_grad()
    with ForcedFloat64():
        expected = expected_loss(trainer, separate, reference)
        expected.backward(retain_graph=True)
        loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
        loss.backward()
    assert loss.dtype == torch.float64
    assert abs(float(loss.detach() - expected.detach())) <= TOLERANCE * abs(float(expected.detach()))
    assert_gradients_equal(gradients_of(trainer.model), gradients_of(separate.model))


def assert_gradients_equal(gradients, expected):
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-6
    for name, gradient in expected.items():
        # A gradient that is itself only rounding error of the others is compared with their size instead.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        error = float((gradients[name] - gradient).abs().max())
        assert error <= TOLERANCE * scale, f"{name}: gradient is off by {error:.1e}, of {scale:.1e}"
