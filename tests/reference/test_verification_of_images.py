"""`verify` on conversations with images, through the processor of the model."""

import pytest
import torch

from support.tiny_vision import screen, tiny_vision_model
from trl_singlepass import verify
from trl_singlepass.attention import Tree
from trl_singlepass.images.reading import ImageReader, image_module


def chat():
    """Return three turns about screens, one of which comes twice."""
    screens = [screen(0), screen(1, width=24), screen(0)]
    messages, images = [], []
    for turn, image in enumerate(screens):
        images.append(image)
        look = [{"type": "image"}, {"type": "text", "text": f"What is at {turn}?"}]
        messages += [
            {"role": "user", "content": look},
            {"role": "assistant", "content": [{"type": "text", "text": f"A button, {turn}."}]},
        ]
    return {"messages": messages, "images": images}


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_images_are_verified(family):
    model, processor = tiny_vision_model(family, torch.float64)
    report = verify(model, processor, [chat()])
    assert report.ok, report
    assert len(report.rows[0].turns) == 3
    assert "get_image_features" not in vars(image_module(model))  # left as it was


def test_a_model_that_reads_images_goes_on_reading_them():
    model, processor = tiny_vision_model("qwen3_vl", torch.float64)
    ImageReader.enable(model)
    before = image_module(model).get_image_features
    assert verify(model, processor, [chat()]).ok
    assert image_module(model).get_image_features == before


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5", "idefics3", "llava", "llava_onevision"])
def test_images_of_other_families_are_verified(family):
    model, processor = tiny_vision_model(family, torch.float64)
    report = verify(model, processor, [chat()])
    assert report.ok, report


def test_a_defect_of_images_is_found(monkeypatch):
    monkeypatch.setattr(Tree, "image_plan", property(lambda tree: tree.plan))
    model, processor = tiny_vision_model("gemma3", torch.float64)
    report = verify(model, processor, [chat()])
    assert not report.ok
