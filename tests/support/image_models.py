"""Tiny random models that read images, with pixels made by hand: no processor, no tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

from support.image_samples import PLACEHOLDER
from support.tiny_models import tiny_model_of_class
from trl_singlepass.trees.image_features import ImageReference


START, END, VIDEO, VOCAB_SIZE = 91, 92, 93, 97
PATCH = 4
"""Side of a patch in pixels; towers that merge 2 × 2 patches show one token per 8 × 8 pixels."""
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "attention_dropout": 0.0,
    "initializer_range": 0.2,
}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}
QWEN_TOKENS = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = MOE | {"shared_expert_intermediate_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
}
GEMMA = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA = {"model_type": "llama"} | TEXT
SMALL, WIDE = (16, 16), (16, 32)
"""Heights and widths of images in pixels."""


def pixels(image, *shape):
    """Return the random numbers of an image: the same content gives the same."""
    generator = torch.Generator().manual_seed(sum(map(ord, image.content)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def patches(images):
    """Qwen's flat patches with a grid per image; merged 2 × 2, an image of 16 × 32 pixels has eight features."""
    sides = [(size[0] // PATCH, size[1] // PATCH) for size in map(size_of, images)]
    values = [pixels(image, rows * cols, 3 * 2 * PATCH**2) for image, (rows, cols) in zip(images, sides, strict=True)]
    return {"pixel_values": torch.cat(values), "image_grid_thw": torch.tensor([(1, *side) for side in sides])}


def squares(images):
    """One square picture per image, whatever its size."""
    return {"pixel_values": torch.stack([pixels(image, 3, 16, 16) for image in images])}


def crops(images):
    """One square picture of 8 × 8 pixels per tile of an image, all in one batch."""
    return {"pixel_values": torch.cat([pixels(image, _num_tiles(image), 3, 8, 8) for image in images])}


def crops_of_a_sample(images):
    """The same with a first dimension for samples, of which there is one."""
    return {name: value[None] for name, value in crops(images).items()}


def padded(images):
    """Pictures of different sizes, padded to the largest."""
    sizes = torch.tensor([size_of(image) for image in images])
    values = torch.zeros(len(images), 3, *sizes.amax(0).tolist(), dtype=torch.float64)
    for value, image, (height, width) in zip(values, images, sizes.tolist(), strict=True):
        value[:, :height, :width] = pixels(image, 3, height, width)
    return {"pixel_values": values, "image_sizes": sizes}


def tiles_at_any_resolution(images):
    """LLaVA's overview and one tile per 8 × 8 pixels, padded to the most tiles."""
    most = 1 + max(map(_num_tiles, images))
    values = torch.zeros(len(images), most, 3, 8, 8, dtype=torch.float64)
    for value, image in zip(values, images, strict=True):
        value[: 1 + _num_tiles(image)] = pixels(image, 1 + _num_tiles(image), 3, 8, 8)
    return {"pixel_values": values, "image_sizes": torch.tensor([size_of(image) for image in images])}


def patches_with_positions(images):
    """Gemma 4's patches with their places, padded with -1."""
    most = max(size_of(image)[0] * size_of(image)[1] for image in images) // PATCH**2
    values = torch.zeros(len(images), most, 3 * PATCH**2, dtype=torch.float64)
    places = torch.full((len(images), most, 2), -1)
    for value, place, image in zip(values, places, images, strict=True):
        rows, columns = (side // PATCH for side in size_of(image))
        value[: rows * columns] = pixels(image, rows * columns, 3 * PATCH**2)
        place[: rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    return {"pixel_values": values, "image_position_ids": places}


def size_of(image):
    """Return the height and width of an image in pixels, which its name says."""
    return WIDE if image.content.startswith("wide") else SMALL


def _num_tiles(image):
    return size_of(image)[0] * size_of(image)[1] // 64


@dataclass(frozen=True)
class ImageFamily:
    """How to build a tiny model, and what it reads of images."""

    model_class: str
    config: Callable[..., transformers.PreTrainedConfig]
    """Takes changes of the text model's configuration and of the whole."""
    load: Callable[[list[ImageReference]], dict[str, torch.Tensor]]


def _qwen(name, text, tower, tokens=QWEN_TOKENS):
    return _tower_and_text(name, TEXT | text, QWEN_TOWER | tower, patches, **tokens)


def _tower_and_text(name, text, tower, load, **own):
    def config(text_changes=(), **changes):
        return getattr(transformers, f"{name}Config")(
            text_config=text | dict(text_changes), vision_config=tower, tie_word_embeddings=False, **own | changes
        )

    return ImageFamily(f"{name}ForConditionalGeneration", config, load)


DEEPSTACK = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
GLM_TOKENS = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}
IMAGE_TOKEN = {"image_token_id": PLACEHOLDER}
FAMILIES = {
    "qwen2_5_vl": _qwen("Qwen2_5_VL", {"rope_parameters": ROPE}, {"fullatt_block_indexes": [1], "window_size": 8}),
    "qwen3_vl": _qwen("Qwen3VL", {"rope_parameters": ROPE}, DEEPSTACK),
    "qwen3_vl_moe": _qwen("Qwen3VLMoe", {"rope_parameters": ROPE} | MOE, DEEPSTACK),
    "qwen3_5": _qwen("Qwen3_5", LINEAR, {"num_position_embeddings": 64}),
    "qwen3_5_moe": _qwen("Qwen3_5Moe", LINEAR | SHARED_EXPERT, {"num_position_embeddings": 64}),
    "glm46v": _qwen(
        "Glm46V",
        {"model_type": "glm4v_text", "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
        {"model_type": "glm4v_vision", "image_size": 32},
        GLM_TOKENS,
    ),
    "gemma3": _tower_and_text(
        "Gemma3", TEXT | GEMMA | {"query_pre_attn_scalar": 8}, TOWER | {"image_size": 16, "vision_use_head": False},
        squares, mm_tokens_per_image=4, image_token_index=PLACEHOLDER, boi_token_index=START, eoi_token_index=END,
    ),
    "gemma4": _tower_and_text(
        "Gemma4",
        TEXT | GEMMA | {
            "use_bidirectional_attention": "vision", "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 8, "global_head_dim": 8,
        },
        TOWER | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 64},
        patches_with_positions, image_token_id=PLACEHOLDER, boi_token_id=START, eoi_token_id=END, video_token_id=VIDEO,
        audio_token_id=94, boa_token_id=95, eoa_token_index=96,
    ),
    "idefics3": _tower_and_text(
        "Idefics3", LLAMA, TOWER | {"image_size": 8}, crops_of_a_sample, scale_factor=2, **IMAGE_TOKEN
    ),
    "smolvlm": _tower_and_text(
        "SmolVLM", LLAMA, TOWER | {"image_size": 8}, crops_of_a_sample, scale_factor=2, **IMAGE_TOKEN
    ),
    "llava_onevision": _tower_and_text(
        "LlavaOnevision", {"model_type": "qwen2"} | TEXT,
        {"model_type": "siglip_vision_model", "image_size": 8, "vision_use_head": False} | TOWER,
        tiles_at_any_resolution, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]], video_token_id=VIDEO,
        **IMAGE_TOKEN,
    ),
    "mistral3": _tower_and_text(
        "Mistral3", {"model_type": "mistral", "sliding_window": None} | TEXT,
        {"model_type": "pixtral", "image_size": 32, "head_dim": 8} | TOWER, padded,
        spatial_merge_size=2, image_token_index=PLACEHOLDER,
    ),
    "internvl": _tower_and_text(
        "InternVL", {"model_type": "qwen2"} | TEXT, {"image_size": [8, 8]} | TOWER | {"patch_size": [4, 4]}, crops,
        image_seq_length=1, **IMAGE_TOKEN,
    ),
}  # fmt: skip


def image_model(family, dtype=torch.float64):
    """Return a tiny random model of a family, in training mode, without dropout."""
    config = FAMILIES[family].config()
    config.get_text_config()._experts_implementation = "eager"  # the grouped kernels have no float64
    return tiny_model_of_class(getattr(transformers, FAMILIES[family].model_class), config, dtype)


def references(model, family, *contents):
    """Return images by name, with as many features as the model computes of each alone."""
    load = FAMILIES[family].load
    found = []
    for content in contents:
        with torch.no_grad():
            inputs = load([ImageReference(content, 0)])
            outputs = model.get_image_features(**{name: _as(model, value) for name, value in inputs.items()})
        features = outputs.pooler_output
        parts = [features] if isinstance(features, torch.Tensor) else features
        found.append(ImageReference(content, sum(part.numel() // part.shape[-1] for part in parts)))
    return found


def loader(family, dtype=torch.float64):
    """Return what loads images for a family's model, in the precision of the model."""

    def load(images):
        inputs = FAMILIES[family].load(images)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    return load


def _as(model, value):
    return value.to(model.dtype) if value.is_floating_point() else value
