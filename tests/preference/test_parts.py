"""Batches of several rows, and rows in waves: loss, gradients and training are those of separate forwards."""

import pytest

from support.chat_tokenizers import make_tokenizer
from support.exact_pairs import ExactPairs, float64_head
from support.pairs import TRAJECTORIES, pair, plain
from support.tiny_models import model_of_type, tiny_model


QUESTION = [{"role": "user", "content": "Tell me all that you know about the numbers. " * 5}]
# The second and the last one answer the same question.
PAIRS = [*TRAJECTORIES, {**pair(2, 7), "prompt": QUESTION}, {**pair(1, 8), "prompt": QUESTION}]
FAMILIES = {
    "qwen3": (lambda size: tiny_model("qwen3", size, attn_implementation="sdpa"), "qwen3"),
    "llama": (lambda size: tiny_model("llama", size, attn_implementation="sdpa"), "llama3"),
    "qwen3-moe": (lambda size: tiny_model("qwen3-moe", size, attn_implementation="sdpa"), "qwen3"),
    "gpt-oss": (lambda size: tiny_model("gpt-oss", size), "gptoss"),
    "qwen3.5": (lambda size: model_of_type("qwen3_5_text", vocab_size=size), "qwen3_5_think"),
}
LOSSES = {
    "sigmoid": {},
    "sorted over the batch": {"loss_types": ["aot"]},
    "mean over the batch": {"loss_types": ["sigmoid", "sft"], "loss_weights": [0.5, 1.0]},
    "weighted": {"use_weighting": True},
    "by length": {"loss_types": ["ipo"], "ld_alpha": 0.3},
}


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    family, settings = request.param
    make_model, template = FAMILIES[family]
    tokenizer = make_tokenizer(template)
    pairs = list(map(plain, PAIRS)) if template == "llama3" else PAIRS
    with float64_head():
        model = make_model(len(tokenizer))
        yield ExactPairs(tmp_path_factory.mktemp("out"), tokenizer, pairs, model, use_weighting=True, **settings)


ROWS = {"max_row_tokens": 260}
# The history of a pair is longer than a wave.
WAVES = {"wave_tokens": 60}
BOTH = {**ROWS, **WAVES}
QUICK = [
    ("llama", ROWS, "sorted over the batch"),
    ("llama", WAVES, "mean over the batch"),
    ("qwen3-moe", BOTH, "sigmoid"),
]
SLOW = [
    *(("llama", settings, name) for settings in (ROWS, WAVES) for name in LOSSES),
    *((family, settings, "sigmoid") for family in FAMILIES for settings in (ROWS, WAVES, BOTH) if family != "gpt-oss"),
    # Its system prompt is long.
    *(("gpt-oss", settings, "sigmoid") for settings in ({"max_row_tokens": 600}, WAVES)),
    ("llama", {**WAVES, "offload_kv": True}, "sigmoid"),
]
CASES = [
    *(pytest.param((family, settings), name, id=f"{family}-{name}") for family, settings, name in QUICK),
    *(
        pytest.param((family, settings), name, id=f"{family}-{'-'.join(settings)}-{name}", marks=pytest.mark.slow)
        for family, settings, name in SLOW
    ),
]


@pytest.mark.parametrize(("case", "name"), CASES, indirect=["case"])
def test_loss_and_gradients_equal_separate_forwards(case, name):
    rows = case.batch["tree"].rows
    assert case.trainer._pieces.runner(case.trainer.model, rows, trains=False).num_pieces > 2
    assert "not trained" not in case.trainer.train_dataset.info.description  # no turn is cut
    case.set_loss(**LOSSES[name])
    case.assert_equal()
