"""With images: a step moves parameters as stock `SFTTrainer` does on the expanded samples, with a real processor."""

import pytest

from support.screens import examples_of, expand_images
from support.slow import slow_but_for
from support.tiny_vision import FAMILIES, tiny_vision_model
from support.trainers import as_dataset, assert_trained_alike, in_order, on_samples, parameters
from trl_singlepass import to_npass


def assert_equal(tmp_path, family, samples_of, batch_size, accumulation=1):
    """Assert that both ways move a model alike on the same conversations per step, and its encoder of images."""
    model, processor = tiny_vision_model(family)
    examples, steps = examples_of(family), {"gradient_accumulation_steps": accumulation}
    steps["per_device_train_batch_size"] = batch_size
    samples = [list(samples_of(example, processor)) for example in examples]
    stock = on_samples(tmp_path / "stock", processor, model, samples, **steps)
    stock.model_accepts_loss_kwargs = True  # else, it averages the means of the batches of a step
    single_pass = in_order(tmp_path, processor, model, examples, **steps)
    for trainer in (stock, single_pass):
        trainer.train()
    assert_trained_alike(stock, single_pass, model, keys=())
    start = dict(model.named_parameters())
    tower = [(value - start[name]).any() for name, value in parameters(stock).items() if "vis" in name]
    assert sum(tower) >= len(tower) // 2 > 0  # LLaVA reads the last layer but one


def as_messages(example, processor):
    """Samples as messages, which TRL renders; independent of how a single pass renders them."""
    return expand_images(example)


def as_text(example, processor):
    """Samples as text: the prompt as a server sends it."""
    return to_npass(as_dataset([example]), processor)


@pytest.mark.parametrize("family", slow_but_for(["qwen3_vl", "gemma3"], FAMILIES))
def test_one_step_of_every_family(tmp_path, family):
    assert_equal(tmp_path, family, as_text, batch_size=4)


# TRL renders another prompt for one, and adds no stop token for the other, whose template writes none.
RENDERED_ALIKE = [family for family in FAMILIES if family not in ("llava_onevision", "llava")]


@pytest.mark.parametrize(
    ("family", "batch_size", "accumulation"),
    slow_but_for(
        [("qwen3_vl", 2, 2)],
        [(family, *steps) for family in RENDERED_ALIKE for steps in ((1, 1), (1, 4), (2, 2), (8, 1))],
    ),
)
def test_one_step_over_batch_size_and_accumulation(tmp_path, family, batch_size, accumulation):
    assert_equal(tmp_path, family, as_messages, batch_size, accumulation)
