"""Loss and all gradients equal N separate forwards per turn and trajectory, in float64, for every loss of TRL."""

import pytest

from support.chat_tokenizers import make_tokenizer
from support.exact_pairs import ExactPairs, float64_head
from support.pairs import TRAJECTORIES, plain
from support.tiny_models import model_of_type, tiny_model


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
    "qwen3.5": (lambda size: model_of_type("qwen3_5_text", vocab_size=size), "qwen3_5_think"),
}


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A trainer in float64 beside separate forwards."""
    make_model, template = FAMILIES[request.param]
    tokenizer = make_tokenizer(template)
    pairs = list(map(plain, TRAJECTORIES)) if template == "llama3" else TRAJECTORIES
    with float64_head():
        # Weights of WPO need one more output of the head, which the trainer asks for when it is made.
        yield ExactPairs(
            tmp_path_factory.mktemp("out"), tokenizer, pairs, make_model(len(tokenizer)), use_weighting=True
        )


# All losses of one family always, one loss of the others; what is TRL's own code does not depend on the family.
CASES = [
    pytest.param(family, name, marks=() if family == "llama" or name == "sigmoid" else pytest.mark.slow)
    for family in FAMILIES
    for name in LOSSES
]


@pytest.mark.parametrize(("case", "name"), CASES, indirect=["case"])
def test_loss_and_gradients_equal_separate_forwards(case, name):
    case.set_loss(**LOSSES[name])
    case.assert_equal()
