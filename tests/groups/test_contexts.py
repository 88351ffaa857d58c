"""GRPO and RLOO on rollouts of several requests equal one row per request with the advantage of its rollout."""

from types import SimpleNamespace

import pytest
from peft import LoraConfig

from support.groups import GRPO, RLOO, assert_equal, assert_moved_alike, image_prompts, train
from support.rollouts import Scripted, StockGRPO, StockRLOO
from support.small_files import write_model
from support.tiny_vision import save_vision_checkpoint, tiny_processor
from support.trainers import float32_model, logged
from trl_singlepass.groups.contexts import read_rollouts


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ON_REQUESTS = (StockGRPO, GRPO[0][1]), GRPO[1]
RLOO_ON_REQUESTS = (StockRLOO, RLOO[0][1]), RLOO[1]
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
TWICE = {"num_iterations": 2, "steps_per_generation": 2}
GSPO = {"importance_sampling_level": "sequence"}
ADAPTERS = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_model(tmp_path_factory.mktemp("model"), tokenizer)


def appended(**options):
    return lambda: Scripted(kinds=("appended",), **options)


def served(trainer_class):
    """Return a trainer that takes the log-probabilities of rollouts for those of a server."""

    class Served(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.use_vllm, self._last_loaded_step = True, -1
            self.vllm_generation = SimpleNamespace(sync_weights=lambda: None)

    return Served


def assert_equals_requests(both, tmp_path, model, tokenizer, own=None, **settings):
    # Parameters move by more than a hundred thousand times the rounding of float32.
    settings = {"rollouts": Scripted, "tolerance": 1e-5, "learning_rate": 0.5, **settings}
    return assert_equal(both, tmp_path, model, tokenizer, own, **settings)


CASES = [
    (ON_REQUESTS, {"loss_type": "dapo"}, {}),
    (ON_REQUESTS, {"loss_type": "dr_grpo", "beta": 0.04, **TWICE, **GSPO}, {}),
    (ON_REQUESTS, {"loss_type": "grpo", "beta": 0.04}, {"max_row_tokens": 400}),
    (ON_REQUESTS, {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "temperature": 0.7}, {}),
    (ON_REQUESTS, {"peft_config": ADAPTERS, "beta": 0.04, "gradient_checkpointing": True}, {"wave_tokens": 200}),
    (RLOO_ON_REQUESTS, {"beta": 0.04, "learning_rate": 0.05, **TWICE}, {}),
]


@pytest.mark.parametrize(("both", "settings", "own"), CASES)
def test_three_steps(tmp_path, folder, tokenizer, both, settings, own):
    ours = assert_equals_requests(both, tmp_path, folder, tokenizer, own, **settings)
    assert min(logged(ours, "sharing_factor")) > 1.3


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("iterations", [{}, TWICE], ids=["once", "twice"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("both", "loss"),
    [
        *((ON_REQUESTS, {"loss_type": name}) for name in LOSSES),
        *((ON_REQUESTS, {"loss_type": name, **GSPO}) for name in LOSSES),
        (RLOO_ON_REQUESTS, {"learning_rate": 0.01}),
    ],
)
def test_all_of_them(tmp_path, folder, tokenizer, both, loss, beta, iterations, accumulation):
    settings = {**loss, "beta": beta, "gradient_accumulation_steps": accumulation, **iterations}
    assert_equals_requests(both, tmp_path, folder, tokenizer, **settings)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "qwen3_5_text"])
def test_families(tmp_path, tokenizer, family):
    router = {} if family == "qwen3_5_text" else {"output_router_logits": False}
    make = lambda: float32_model(tokenizer, family, "eager", **router)  # noqa: E731
    assert_equals_requests(ON_REQUESTS, tmp_path, make, tokenizer)


@pytest.mark.parametrize("settings", [{"beta": 0.04, **TWICE}, {"loss_type": "cispo"}, GSPO])
def test_rollouts_that_only_append_are_trls(tmp_path, folder, tokenizer, settings):
    """TRL gets one line for each, in which `env_mask` marks what the model generated."""
    settings = {"learning_rate": 0.5, **settings}
    stock, before = train(
        GRPO[0], tmp_path / "stock", folder, tokenizer, rollouts=appended(as_one_line=True), **settings
    )
    ours, _ = train(GRPO[1], tmp_path / "ours", folder, tokenizer, rollouts=appended(), **settings)
    assert_moved_alike(ours, stock, before, 1e-5)


@pytest.mark.parametrize("kind", [GRPO[1], RLOO[1]], ids=["grpo", "rloo"])
def test_what_an_environment_wrote_is_not_trained(tmp_path, folder, tokenizer, kind):
    """As one line with an `env_mask`, without `contexts`, and as requests: RLOO of TRL takes neither."""
    settings = {"learning_rate": 0.05, "beta": 0.04}
    line, before = train(kind, tmp_path / "line", folder, tokenizer, rollouts=appended(as_one_line=True), **settings)
    requests, _ = train(kind, tmp_path / "requests", folder, tokenizer, rollouts=appended(), **settings)
    assert_moved_alike(requests, line, before, 1e-4)


WRONG = {
    "a count too many": ("contexts", lambda fields: fields["contexts"][1].append(([5], 1))),
    "a count below zero": ("contexts", lambda fields: fields["contexts"][1].extend([([5], -1), ([5], 1)])),
    "missing for some": ("contexts", lambda fields: fields["contexts"].__setitem__(2, None)),
    "too few rollouts": ("contexts", lambda fields: fields["contexts"].pop()),
    "outside the vocabulary": ("contexts", lambda fields: fields["contexts"][0].__setitem__(0, ([10**6], 1))),
    "no prompt": ("contexts", lambda fields: fields["contexts"][0].append(([], 0))),
    "short log-probabilities": ("logprobs", lambda fields: fields["logprobs"][3].pop()),
    "nothing generated": (
        "completion_ids",
        lambda fields: fields.update(completion_ids=[[] for _ in range(8)], logprobs=None, contexts=[[([5], 0)]] * 8),
    ),
    "a field of TRL is missing": ("logprobs", lambda fields: fields.pop("logprobs")),
}


@pytest.mark.parametrize("kind", [GRPO[1], RLOO[1]], ids=["grpo", "rloo"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_field_is_an_error_before_anything_trains(tmp_path, folder, tokenizer, kind, wrong):
    name, change = WRONG[wrong]
    one_request = Scripted(num_requests=1, change=lambda fields: (change(fields), fields)[1])
    with pytest.raises(ValueError, match=name):
        train(kind, tmp_path, folder, tokenizer, rollouts=lambda: one_request, max_steps=1)
    assert one_request.calls == 1


def test_images_are_refused(tmp_path):
    """Where the dataset has a column of images, and where a request shows one."""
    processor, folder = tiny_processor("qwen3_vl"), save_vision_checkpoint("qwen3_vl", tmp_path / "model")
    processor.tokenizer.padding_side = "left"
    settings = {"rollouts": lambda: Scripted(num_requests=1, vocab_size=100), "max_steps": 1}
    with pytest.raises(ValueError, match="images"):
        train(GRPO[1], tmp_path, folder, processor, dataset=image_prompts(), **settings)
    with pytest.raises(ValueError, match="images"):
        read_rollouts({"prompt_ids": [[5]], "completion_ids": [[6]], "contexts": [[([5, 9], 1)]]}, 10, placeholder=9)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_log_probabilities_of_a_server_correct_each_token(tmp_path, folder, tokenizer, mode):
    settings = {"vllm_importance_sampling_mode": mode, "max_steps": 2}
    both = tuple((served(cls), config) for cls, config in ON_REQUESTS)
    ours = assert_equals_requests(both, tmp_path, folder, tokenizer, **settings)
    assert logged(ours, "sampling/importance_sampling_ratio/max")[0] != 1


def test_truncated_rollouts_are_masked_whole(tmp_path, folder, tokenizer):
    """TRL looks at the last token of the last request; a masked rollout trains none of its requests."""
    settings = {"rollouts": lambda: Scripted(ends=True), "mask_truncated_completions": True}
    ours = assert_equals_requests(ON_REQUESTS, tmp_path, folder, tokenizer, **settings)
    whole, _ = train(GRPO[1], tmp_path / "whole", folder, tokenizer, rollouts=settings["rollouts"])
    assert logged(ours, "num_trained_tokens")[0] < logged(whole, "num_trained_tokens")[0]
