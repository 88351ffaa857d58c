"""Further model types that read images: loss and gradients equal N-pass in float64; `docs/images.md` lists them."""

from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from support.float64_comparison import assert_same_loss_and_gradients
from support.image_chats import CHATS
from support.image_models import pixels
from support.image_samples import PLACEHOLDER, conversation_of
from support.tiny_multimodal import tiny_conditional
from trl_singlepass.images.features import image_module
from trl_singlepass.images.reading import ImageReader
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients
from trl_singlepass.reference.single_pass import RowImages
from trl_singlepass.training.model import enable_tree
from trl_singlepass.trees.image_features import ImageReference


PAGE = Path(__file__).parents[2] / "docs" / "images.md"
# Flat patches with a grid per image, and pictures of one size.
PATCHES = [
    *("cosmos3_edge", "cosmos3_omni", "dots3_note", "exaone4_5", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr"),
    *("hunyuan_vl", "hy_v4_vl", "hyperclovax_vision_v2", "lfm3_vl", "minimax_m3_vl", "qwen2_vl"),
    *("qwen3_omni_moe_thinker", "qwen4_exp"),
]
PICTURES = ["aya_vision", "cohere2_vision", "deepseek_ocr2", "deepseek_vl", "got_ocr2", "janus", "llava", "ovis2"]
PICTURES += ["step3p7", "video_llava"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),  # of models that nobody has looked after for years
]


def loader(model, has_patches):
    """Return what loads images by name for a model, in the sizes of its encoder."""
    config = model.config.vision_config
    side, channels = _first(config, "patch_size"), _first(config, "in_channels", "num_channels", default=3)
    merged, frames = _first(config, "spatial_merge_size", default=2), _first(config, "temporal_patch_size", default=1)

    def patches(images):
        grids = [(2 * merged, 2 * merged * (1 + image.content.startswith("wide"))) for image in images]
        values = [
            pixels(image, rows * columns, channels * frames * side**2)
            for image, (rows, columns) in zip(images, grids, strict=True)
        ]
        return {"pixel_values": torch.cat(values), "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}

    def pictures(images):
        size = _first(config, "image_size", default=16)
        return {"pixel_values": torch.stack([pixels(image, channels, size, size) for image in images])}

    return patches if has_patches else pictures


def _first(config, *names, default=None):
    values = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
    value = values[0] if values else default
    return value[0] if isinstance(value, list | tuple) else value


def references(model, load):
    found = []
    for content in ("small", "other", "wide", "last"):
        with torch.no_grad():
            features = image_module(model).get_image_features(**load([ImageReference(content, 0)])).pooler_output
        parts = [features] if isinstance(features, torch.Tensor) else features
        found.append(ImageReference(content, sum(part.numel() // part.shape[-1] for part in parts)))
    return found


@pytest.mark.parametrize("model_type", [*PATCHES, *PICTURES])
def test_model_type_is_exact_with_images(model_type):
    model = tiny_conditional(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    name = "image_token_id" if hasattr(model.config, "image_token_id") else "image_token_index"
    setattr(model.config, name, PLACEHOLDER)
    load = loader(model, model_type in PATCHES)
    samples = conversation_of(CHATS["reasoning"](*([91, image, 92] for image in references(model, load))))
    expected = npass_loss_and_gradients(model, samples, load_images=load)
    enable_tree(model)
    found = single_pass_loss_and_gradients(model, samples, RowImages(ImageReader.enable(model), load))
    assert_same_loss_and_gradients(found.loss, found.gradients, expected)
    encoder = [value for name, value in expected.gradients.items() if "vis" in name or "image_tower" in name]
    assert sum(bool(value.abs().max() > 0) for value in encoder) >= len(encoder) // 2 > 0


def test_the_page_lists_them():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in (*PATCHES, *PICTURES))
