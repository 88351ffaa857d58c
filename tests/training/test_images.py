"""Training on rows with images: what the trainer gives the model, and what it refuses."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from support.image_chats import HandMadeImages, image_collator, image_rows, image_sample_sets
from support.image_models import FAMILIES, image_model
from support.sample_sets import reasoning_chat
from support.slow import slow_but_for
from support.trainers import SETTINGS, single_pass_trainer
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.images.reading import UnsupportedImagesError
from trl_singlepass.reference import npass_loss_and_gradients
from trl_singlepass.training.compatibility import read_images
from trl_singlepass.training.epochs import blank_batch
from trl_singlepass.training.situation import Situation


def image_trainer(tmp_path, model, sample_sets, **settings):
    kwargs = {"data_collator": image_collator(model)}
    rows, tokenizer = image_rows(sample_sets), make_tokenizer("qwen3")
    return single_pass_trainer(tmp_path, tokenizer, rows, model, kwargs=kwargs, max_length=None, **settings)


@pytest.mark.parametrize(
    ("family", "batch_size"),
    slow_but_for([("qwen3_vl", 1), ("gemma3", 4)], itertools.product(FAMILIES, (1, 2, 4))),
)
def test_one_step_equals_npass(tmp_path, family, batch_size):
    model = image_model(family, torch.float32)
    if batch_size < 4:  # the load-balancing loss is one of each micro-batch, so only a single one has N-pass's
        model.config.get_text_config().output_router_logits = False
        model.config.get_text_config().router_aux_loss_coef = 0.0  # TRL decides by the factor
    sets = image_sample_sets(model)[:4]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = [sample for samples in sets for sample in samples]
    expected = npass_loss_and_gradients(model, samples, load_images=HandMadeImages(model))
    steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
    trainer = image_trainer(tmp_path, model, sets, **steps)
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, parameter in trainer.model.named_parameters():
        step = (before[name] - parameter.detach()) / SETTINGS["learning_rate"]
        assert float((step - expected.gradients[name]).abs().max()) <= 2e-5 * largest, name


def test_several_ranks_need_a_blank_image():
    model = image_model("qwen3_vl", torch.float32)
    args, accelerator = SimpleNamespace(wave_tokens=None), SimpleNamespace(parallelism_config=None, num_processes=2)
    collator = DataCollatorForSinglePass(0, load_images=lambda images: {})
    with pytest.raises(ValueError, match="a method `blank`"):
        read_images(Situation(args, model, accelerator), collator, model)


def test_a_blank_image_stands_in_for_the_images_of_a_row_of_text():
    model = image_model("qwen3_vl", torch.float32)
    (row,) = image_rows([reasoning_chat(turns=1, vocab_size=80)])
    collator = image_collator(model)
    assert "pixel_values" not in collator([row])
    collator.blank_image = collator.load_images.blank
    assert {"pixel_values", "image_grid_thw"} <= collator([row]).keys()
    assert blank_batch(collator).keys() == collator([row]).keys()


def test_a_model_that_mixes_images_is_refused_before_its_dataset_is_read(tmp_path, monkeypatch):
    model = image_model("gemma3", torch.float32)
    # As PaliGemma: the whole prompt is one block.
    monkeypatch.setattr(modeling_gemma3, "get_block_sequence_ids_for_mask", lambda types, device=None: types * 0)
    with pytest.raises(UnsupportedImagesError, match="see more than their own image in both directions"):
        image_trainer(tmp_path, model, image_sample_sets(model)[:1])


def test_images_that_come_up_later_are_refused_by_name(tmp_path):
    model, tokenizer = image_model("qwen3_vl", torch.float32), make_tokenizer("qwen3")
    kwargs = {"data_collator": image_collator(model)}
    trainer = single_pass_trainer(tmp_path, tokenizer, [chat(1)], kwargs=kwargs)
    with pytest.raises(ValueError, match="enable_images"):
        trainer.evaluate(image_rows(image_sample_sets(model)[:1]))
