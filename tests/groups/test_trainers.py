"""Three steps of GRPO and RLOO on trees move parameters as TRL's trainers do, from the same completions."""

import pytest
from peft import LoraConfig

from support.groups import GRPO, RLOO, assert_equal, image_prompts, train
from support.small_files import write_model
from support.tiny_vision import save_vision_checkpoint, tiny_processor
from support.trainers import float32_model, logged
from trl_singlepass.images.reading import ImageReader, UnsupportedImagesError


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model with its tokenizer, on disk: TRL loads the reference from there."""
    return write_model(tmp_path_factory.mktemp("model"), tokenizer)


MORE = [(RLOO, "qwen3_vl"), (GRPO, "qwen3_5"), (GRPO, "gemma3"), (GRPO, "idefics3"), (GRPO, "llava")]
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
TWICE = {"num_iterations": 2, "steps_per_generation": 2}
ADAPTERS = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
WAVES = {"wave_tokens": 32}
# Settings of both trainers, and of ours alone.
CASES = [
    (GRPO, {"loss_type": "dapo"}, {}),
    (GRPO, {"loss_type": "bnpo"}, {}),
    (GRPO, {"beta": 0.04, **TWICE}, {}),
    (GRPO, {"importance_sampling_level": "sequence", "beta": 0.04}, {}),
    (GRPO, {"top_entropy_quantile": 0.5, "entropy_coef": 0.1}, {}),
    (GRPO, {"temperature": 0.7, "steps_per_generation": 4}, {}),
    # The policy without its adapters is the reference; layers run again in the backward.
    (GRPO, {"peft_config": ADAPTERS, "beta": 0.04, "gradient_checkpointing": True}, {}),
    (GRPO, {"beta": 0.04, "entropy_coef": 0.1}, {"max_row_tokens": 120}),
    (GRPO, {"beta": 0.04, "entropy_coef": 0.1}, WAVES),
    (RLOO, {}, {}),
    (RLOO, {}, WAVES),
    (GRPO, {"use_transformers_continuous_batching": True, "beta": 0.04}, {}),
    (RLOO, {"use_transformers_paged": True, "temperature": 0.9}, {}),
]


@pytest.mark.parametrize(("both", "settings", "own"), CASES)
def test_three_steps(tmp_path, folder, tokenizer, both, settings, own):
    ours = assert_equal(both, tmp_path, folder, tokenizer, own, **settings)
    assert own or "loss_type" not in settings or min(logged(ours, "sharing_factor")) > 1.3


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("iterations", [{}, TWICE], ids=["once", "twice"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("both", "loss_type"), [*((GRPO, name) for name in LOSSES), (RLOO, None)])
def test_all_of_them(tmp_path, folder, tokenizer, both, loss_type, beta, iterations, accumulation):
    settings = {} if loss_type is None else {"loss_type": loss_type}
    settings |= {"beta": beta, "gradient_accumulation_steps": accumulation, **iterations}
    assert_equal(both, tmp_path, folder, tokenizer, **settings)


def generated_elsewhere(kind):
    """Return a trainer that gets completions as if from vLLM, whose log-probabilities differ from the model's."""
    trainer_class, config_class = kind

    class Served(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.use_vllm = True

        def _generate_single_turn(self, *args, **kwargs):
            self.use_vllm = False
            completions, _ = super()._generate_single_turn(*args, **kwargs)
            self.use_vllm = True
            return completions, [[-6.5 + 0.1 * (token % 3) for token in line] for line in completions]

    return Served, config_class


@pytest.mark.parametrize("mode", ["token_truncate", pytest.param("sequence_mask", marks=pytest.mark.slow)])
def test_what_vllm_generates_is_corrected(tmp_path, folder, tokenizer, mode):
    both = tuple(map(generated_elsewhere, GRPO))
    ours = assert_equal(both, tmp_path, folder, tokenizer, vllm_importance_sampling_mode=mode)
    assert logged(ours, "sampling/importance_sampling_ratio/max")[0] != 1


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "qwen3_5_text"])
def test_families(tmp_path, tokenizer, family):
    # TRL asks for router logits in the loss alone; generation could not compute their loss.
    router = {} if family == "qwen3_5_text" else {"output_router_logits": False}
    assert_equal(GRPO, tmp_path, lambda: float32_model(tokenizer, family, "eager", **router), tokenizer)


def test_lines_of_a_prompt_lie_together(tmp_path, folder, tokenizer):
    """With 8 lines of 2 prompts in a step, each batch of 4 holds one prompt, and shares all of it."""
    ours, _ = train(GRPO[1], tmp_path, folder, tokenizer, max_steps=1, loss_type="dapo")
    shuffled, _ = train(GRPO[1], tmp_path, folder, tokenizer, max_steps=1, loss_type="bnpo")
    assert logged(ours, "sharing_factor")[0] > logged(shuffled, "sharing_factor")[0]


def with_images(tmp_path, family):
    """Return a model on disk, its processor, and settings; no completion shows an image, which TRL would not find."""
    processor = tiny_processor(family)
    processor.tokenizer.padding_side = "left"
    never = {"suppress_tokens": processor.tokenizer.all_special_ids}
    settings = {"dataset": image_prompts(), "generation_kwargs": never}
    return save_vision_checkpoint(family, tmp_path / "model"), processor, settings


@pytest.mark.parametrize(
    ("both", "family"),
    [(GRPO, "qwen3_vl"), (RLOO, "gemma3"), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_prompts_with_images(tmp_path, both, family):
    """The reference too reads images on trees."""
    folder, processor, settings = with_images(tmp_path, family)
    own = {"wave_tokens": 40} if both is GRPO else {}
    ours = assert_equal(both, tmp_path, folder, processor, own, beta=0.04, **settings)
    assert min(logged(ours, "sharing_factor")) > 1.5


def test_images_that_a_tree_cannot_show_run_as_trl_runs_them(tmp_path, monkeypatch, caplog):
    def refuse(model):
        raise UnsupportedImagesError("no way to show it")

    monkeypatch.setattr(ImageReader, "enable", refuse)
    folder, processor, settings = with_images(tmp_path, "qwen3_vl")
    ours = assert_equal(GRPO, tmp_path, folder, processor, max_steps=2, **settings)
    assert logged(ours, "sharing_factor") == [1, 1]
    (line,) = [record.message for record in caplog.records if "as TRL runs them" in record.message]
    assert "no way to show it" in line
