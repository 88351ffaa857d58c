"""Tiny random models of every type that reads images, and what their encoders take, made by hand: no processor."""

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from support.image_samples import PLACEHOLDER
from support.tiny_multimodal import tiny_conditional
from trl_singlepass.images.reading import image_module
from trl_singlepass.trees.image_features import ImageReference


def image_model(model_type, dtype=torch.float64):
    """Return a tiny random model of a type, in training mode, without dropout."""
    class_name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    model = tiny_conditional(class_name, dtype=dtype, pad_token_id=0)  # that of the tokenizers of tests
    name = "image_token_id" if hasattr(model.config, "image_token_id") else "image_token_index"
    setattr(model.config, name, PLACEHOLDER)
    return model


def references(model, *contents):
    """Return images by name, with as many features as the model computes of each alone."""
    found = []
    for content in contents:
        with torch.no_grad():
            outputs = image_module(model).get_image_features(**loader(model)([ImageReference(content, 0)]))
        features = outputs.last_hidden_state if outputs.pooler_output is None else outputs.pooler_output
        parts = [features] if isinstance(features, torch.Tensor) else features
        found.append(ImageReference(content, sum(part.numel() // part.shape[-1] for part in parts)))
    return found


def loader(model):
    """Return what loads images by name for a model, in its precision and in the sizes of its encoder."""

    def load(images):
        inputs = _INPUTS[model.config.model_type](model.config, images)
        return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    return load


# What encoders take. Images whose name begins with `wide` are twice as wide where an encoder takes several sizes. ----


def pixels(image, *shape):
    """Return the random numbers of an image: the same content gives the same."""
    generator = torch.Generator().manual_seed(sum(map(ord, image.content)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _patches(config, images):
    """Flat patches of all images, with a grid per image."""
    (side, channels, frames), grids = _patch_of(config), _grids(config, images)
    values = [
        pixels(image, *_area(grid), channels * frames * side**2) for image, grid in zip(images, grids, strict=True)
    ]
    return {"pixel_values": torch.cat(values), "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}


def _square_patches(config, images):
    """Patches with a height and a width, otherwise as above."""
    (side, channels, _), inputs = _patch_of(config), _patches(config, images)
    return inputs | {"pixel_values": inputs["pixel_values"].view(-1, channels, side, side)}


def _patches_with_merge_sizes(config, images):
    sizes = torch.full((len(images),), _first(_vision(config), "spatial_merge_size", "merge_size", default=2))
    return _patches(config, images) | {"image_merge_sizes": sizes}


def _padded_patches(config, images):
    """Patches per image, padded to the most (SigLIP 2)."""
    (side, channels, _), grids = _patch_of(config), _grids(config, images)
    most = max(rows * columns for rows, columns in grids)
    values, mask = (
        torch.zeros(len(images), most, channels * side**2, dtype=torch.float64),
        torch.zeros(len(images), most),
    )
    for value, row, image, grid in zip(values, mask, images, grids, strict=True):
        (area,) = _area(grid)
        value[:area], row[:area] = pixels(image, area, channels * side**2), 1
    return {"pixel_values": values, "spatial_shapes": torch.tensor(grids), "pixel_attention_mask": mask.long()}


def _strips(config, images):
    """All patches of all images side by side in one strip, with a grid per image (MiniCPM-V)."""
    (side, channels, _), grids = _patch_of(config), [(8, 8 * (1 + _is_wide(image))) for image in images]
    strips = [
        pixels(image, channels, side, *(side * n for n in _area(g))) for image, g in zip(images, grids, strict=True)
    ]
    return {"pixel_values": torch.cat(strips, -1)[None], "target_sizes": torch.tensor(grids, dtype=torch.int32)}


def _pictures(config, images):
    """One picture of the encoder's own size per image."""
    side, channels = _picture_of(config)
    return {"pixel_values": torch.stack([pixels(image, channels, side, side) for image in images])}


def _pictures_of_a_sample(config, images):
    return {"pixel_values": _pictures(config, images)["pixel_values"][None]}


def _sized_pictures(config, images):
    values = _pictures(config, images)["pixel_values"]
    return {"pixel_values": values, "image_sizes": torch.tensor([values.shape[-2:]] * len(images))}


def _padded_pictures(config, images):
    """Pictures of different sizes, padded to the largest (Pixtral)."""
    side = 4 * config.vision_config.patch_size
    sizes = [(side, side * (1 + _is_wide(image))) for image in images]
    values = torch.zeros(len(images), 3, side, max(width for _, width in sizes), dtype=torch.float64)
    for value, image, size in zip(values, images, sizes, strict=True):
        value[..., : size[1]] = pixels(image, 3, *size)
    return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}


def _crops(config, images):
    """One square picture per tile of an image, all in one batch."""
    side, channels = _picture_of(config)
    return {"pixel_values": torch.cat([pixels(im, 2 + 2 * _is_wide(im), channels, side, side) for im in images])}


def _crops_of_a_sample(config, images):
    return {"pixel_values": _crops(config, images)["pixel_values"][None]}


def _two_resolutions(config, images):
    side = config.high_res_vision_config.image_size
    fine = torch.stack([pixels(image, 3, side, side) for image in images])
    return _pictures(config, images) | {"high_res_pixel_values": fine}


def _merged_patches(config, images):
    """A square of patches per feature, with a grid of features per image (Inkling 2)."""
    side, channels, _ = _patch_of(config)
    side, grids = side * config.vision_config.spatial_merge_size, [(2, 2 + 2 * _is_wide(image)) for image in images]
    values = [pixels(image, *_area(grid), side, side, channels) for image, grid in zip(images, grids, strict=True)]
    return {"pixel_values": torch.cat(values), "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}


def _patches_of_a_sample(config, images):
    """Flat patches of all images in a first dimension for samples (Fuyu)."""
    return {"pixel_values": _patches(config, images)["pixel_values"][None]}


def _patches_with_places(config, images):
    """Flat patches per image with their places, padded with -1 (Gemma 4)."""
    vision, grids = config.vision_config, [(4, 4 + 4 * _is_wide(image)) for image in images]
    length = 3 * getattr(vision, "model_patch_size", vision.patch_size) ** 2
    most = max(rows * columns for rows, columns in grids)
    values, places = torch.zeros(len(images), most, length), torch.full((len(images), most, 2), -1)
    for value, place, image, grid in zip(values, places, images, grids, strict=True):
        (area,) = _area(grid)
        value[:area] = pixels(image, area, length)
        place[:area] = torch.cartesian_prod(*map(torch.arange, grid)).flip(-1)
    return {"pixel_values": values, "image_position_ids": places}


def _tiles(config, images):
    """One or two pictures per image, padded to two."""
    side, channels = _picture_of(config)
    mask = torch.tensor([(True, _is_wide(image)) for image in images])
    values = torch.stack([pixels(image, 2, channels, side, side) for image in images])
    return {"pixel_values": values * mask[..., None, None, None], "pixel_attention_mask": mask}


def _any_resolution(config, images):
    """An overview and one or two tiles per image, padded (LLaVA-NeXT)."""
    side, channels = _picture_of(config)
    sizes = torch.tensor([(side, side * (1 + _is_wide(image))) for image in images])
    values = torch.zeros(len(images), 3, channels, side, side)
    for value, image in zip(values, images, strict=True):
        count = 2 + _is_wide(image)
        value[:count] = pixels(image, count, channels, side, side)
    return {"pixel_values": values, "image_sizes": sizes}


def _patch_of(config):
    """Side, channels and frames of a patch."""
    vision = _vision(config)
    channels, frames = (
        _first(vision, "in_channels", "num_channels", default=3),
        _first(vision, "temporal_patch_size", "patch_temporal"),
    )
    return _first(vision, "patch_size"), channels, frames or 1


def _picture_of(config):
    vision = _vision(config)
    return _first(vision, "image_size", default=16), _first(vision, "in_channels", "num_channels", default=3)


def _vision(config):
    """The part of a configuration that describes the encoder, or all of it."""
    return getattr(config, "vision_config", None) or getattr(config, "vq_config", None) or config


def _grids(config, images):
    merged = _first(_vision(config), "spatial_merge_size", "merge_size", default=2)
    return [(2 * merged, 2 * merged * (1 + _is_wide(image))) for image in images]


def _area(grid):
    return (grid[0] * grid[1],)


def _is_wide(image):
    return image.content.startswith("wide")


def _first(config, *names, default=None):
    values = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
    value = values[0] if values else default
    return value[0] if isinstance(value, list | tuple) else value


_TYPES_BY_INPUT = {
    _patches: "cosmos3_edge cosmos3_omni dots3_note exaone4_5 glm46v glm4v glm4v_moe glm5_next glm_ocr hunyuan_vl "
    "hy_v4_vl hyperclovax_vision_v2 lfm3_vl llava_onevision1_5 minimax_m3_vl muse_glimmer muse_spark "
    "qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe "
    "qwen4_exp",
    _merged_patches: "inkling2 inkling2_loop",
    _patches_of_a_sample: "fuyu",
    _patches_with_places: "gemma4 gemma4_unified",
    _tiles: "granite_docling",
    _any_resolution: "llava_onevision llava_next llava_next_video",
    _square_patches: "paddleocr_vl kimi_k25",
    _patches_with_merge_sizes: "video_llama_3",
    _padded_patches: "lfm2_vl",
    _strips: "minicpm_ocr minicpmv4_6",
    _pictures: "gemma3 aria aya_vision chameleon cohere2_vision deepseek_ocr2 deepseek_vl got_ocr2 janus llama4 llava "
    "ovis2 qianfan_ocr step3p7 video_llava vipllava",
    _pictures_of_a_sample: "idefics2",
    _crops: "internvl",
    _crops_of_a_sample: "idefics3 smolvlm",
    _sized_pictures: "apertus1p5 emu3 lighton_ocr mistral_large4",
    _padded_pictures: "mistral3",
    _two_resolutions: "deepseek_vl_hybrid",
}
_INPUTS = {name: inputs for inputs, names in _TYPES_BY_INPUT.items() for name in names.split()}
FAMILIES = [
    *("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm46v", "gemma3", "gemma4"),
    *("idefics3", "smolvlm", "llava_onevision", "mistral3", "internvl"),
]
"""Types that are tried in every way."""
COMPARED = [*FAMILIES, *(name for name in _INPUTS if name not in (*FAMILIES, "emu3"))]
"""Types that are compared with N-pass; Emu 3 is refused."""
# Their encoders choose tokens of a codebook, through which there is no gradient.
CODEBOOKS = ("apertus1p5", "chameleon")
