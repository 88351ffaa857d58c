"""Further model types that read images: loss and gradients equal N-pass in float64; `docs/models.md` lists them."""

from functools import partial

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from support.float64_comparison import assert_same_loss_and_gradients
from support.image_chats import CHATS
from support.image_samples import PLACEHOLDER, conversation_of
from support.image_survey import CODEBOOKS, SURVEYED, sized_pictures, survey_loader
from support.tiny_multimodal import tiny_conditional
from support.tree_checks import checked_on_images
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.images import reading
from trl_singlepass.images.reading import ImageReader, UnsupportedImagesError, image_module
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients
from trl_singlepass.reference.single_pass import RowImages
from trl_singlepass.trees.image_features import ImageReference


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # of models that nobody has looked after for years
]


def references(model, load):
    found = []
    for content in ("small", "other", "wide", "last"):
        with torch.no_grad():
            outputs = image_module(model).get_image_features(**load([ImageReference(content, 0)]))
        features = outputs.last_hidden_state if outputs.pooler_output is None else outputs.pooler_output
        parts = [features] if isinstance(features, torch.Tensor) else features
        found.append(ImageReference(content, sum(part.numel() // part.shape[-1] for part in parts)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SURVEYED)
def test_model_type_is_exact_with_images(model_type):
    model = tiny_conditional(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    expected, found, report = expected_and_found(model, survey_loader(model, model_type))
    assert report.ok, report.reason
    assert_same_loss_and_gradients(found.loss, found.gradients, expected)
    encoder = [value for name, value in expected.gradients.items() if "vis" in name or "image_tower" in name]
    trained = sum(bool(value.abs().max() > 0) for value in encoder)
    assert trained >= len(encoder) // 2 > 0 or model_type in CODEBOOKS


def expected_and_found(model, load):
    """Return what N-pass and a single pass compute of a conversation with images, and what the check says."""
    name = "image_token_id" if hasattr(model.config, "image_token_id") else "image_token_index"
    setattr(model.config, name, PLACEHOLDER)
    samples = conversation_of(CHATS["reasoning"](*([91, image, 92] for image in references(model, load))))
    expected = npass_loss_and_gradients(model, samples, load_images=load)
    enable_tree(model)
    images = RowImages(ImageReader.enable(model), load)
    return expected, single_pass_loss_and_gradients(model, samples, images), checked_on_images(model, samples, images)


def test_statistics_over_a_batch_of_images_are_refused(monkeypatch):
    model = tiny_conditional("Emu3ForConditionalGeneration")
    load = partial(sized_pictures, model.config)
    with pytest.raises(UnsupportedImagesError, match="over all images of a batch in its BatchNorm3d"):
        ImageReader.enable(model)
    monkeypatch.setattr(reading, "_faults", lambda model, module: iter(()))
    expected, found, _ = expected_and_found(model, load)
    assert abs(found.loss - expected.loss) > 1e-6 * abs(expected.loss)
