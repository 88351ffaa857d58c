"""The tiny models that read images are loaded and run as checkpoints of their families are."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from support.tiny_vision import FAMILIES, save_vision_checkpoint, screen


IMAGE, OTHER_IMAGE = screen(0), screen(1, width=24)
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look at it."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "I do."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And at this."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Wider."}]},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_reads_the_images_that_its_processor_prepares(tmp_path, family):
    path = save_vision_checkpoint(family, tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    assert type(model).__name__ == FAMILIES[family].model_class
    text = processor.apply_chat_template(MESSAGES)
    inputs, swapped = (
        processor(images=[images], text=[text], return_tensors="pt")
        for images in ([IMAGE, OTHER_IMAGE], [OTHER_IMAGE, IMAGE])
    )
    with torch.no_grad():
        last, last_swapped = (model(**x).logits[0, -1] for x in (inputs, swapped))
    assert last.isfinite().all()
    assert (last - last_swapped).abs().max() > 1e-3  # the images matter, and their order
