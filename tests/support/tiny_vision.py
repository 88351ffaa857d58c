"""Tiny random models that read images, each with the processor class of its family, without network."""

from functools import partial

import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from support.chat_tokenizers import make_tokenizer
from support.tiny_multimodal import model_for


PATCH = 4
"""Side of a patch in pixels; towers that merge 2 × 2 patches show one token per 8 × 8 pixels."""
SQUARE = {"patch_size": PATCH, "image_size": 16}
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
IDEFICS_TOKENS = {"image_token": "<image>", "fake": "<fake_token_around_image>", "global": "<global-img>"}
IDEFICS_CROPS = {f"crop_{row}_{column}": f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)}
GEMMA_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}

# The templates of the released processors.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vision_tokenizer(template, names, chat_template=None) -> PreTrainedTokenizerFast:
    """
    Return a small tokenizer whose added tokens have the names by which processors ask for them.

    Args:
        template (`str`):
            One of TRL's chat templates, which also decides BOS, EOS and padding token.
        names (`dict[str, str]`):
            Special tokens of the family by name, `image_token` among them.
        chat_template (`str`, *optional*):
            Source of a template to carry instead of TRL's.
    """
    plain = make_tokenizer(template, chat_template)
    roles = {f"{role}_token": getattr(plain, f"{role}_token") for role in ("bos", "eos", "pad")}
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        extra_special_tokens=names,
        chat_template=plain.chat_template,
        **roles,
    )


def _ids(processor, **tokens):
    """Return configuration entries: the ids of tokens by the name of the entry."""
    return {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _qwen(chat_template):
    tokenizer = vision_tokenizer("qwen3", QWEN_TOKENS, make_tokenizer(chat_template).chat_template)
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    bounds = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=bounds, **sizes),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(size=bounds, **sizes),
        chat_template=tokenizer.chat_template,
    )
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    deepstack = {"deepstack_visual_indexes": [0, 1]} if chat_template == "qwen3_vl" else {}
    return processor, {"vision_config": {"patch_size": PATCH, **deepstack}, **_ids(processor, **ids)}


def _gemma3():
    tokenizer = vision_tokenizer("gemma3", GEMMA_TOKENS)
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=4,
    )
    ids = _ids(
        processor,
        image_token_index="<image_soft_token>",
        image_token_id="<image_soft_token>",
        boi_token_index="<start_of_image>",
        eoi_token_index="<end_of_image>",
    )
    return processor, {"vision_config": {**SQUARE, "vision_use_head": False}, **ids}


def _idefics3():
    tokenizer = vision_tokenizer("idefics3", IDEFICS_TOKENS | IDEFICS_CROPS)
    image_processor = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 8}, do_image_splitting=True
    )
    processor = transformers.Idefics3Processor(
        image_processor=image_processor, tokenizer=tokenizer, image_seq_len=1, chat_template=tokenizer.chat_template
    )
    return processor, {"vision_config": {**SQUARE, "image_size": 8}, **_ids(processor, image_token_id="<image>")}


def _llava():
    tokenizer = vision_tokenizer("llava", {"image_token": "<image>"}, LLAVA_TEMPLATE)
    square = {"height": 16, "width": 16}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    ids = _ids(processor, image_token_id="<image>", image_token_index="<image>")
    return processor, {"vision_config": SQUARE, "image_seq_length": 16, **ids}


def _llava_onevision():
    names = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = vision_tokenizer("qwen3", names, LLAVA_ONEVISION_TEMPLATE)
    square = {"height": 16, "width": 16}
    grid = [[16, 16], [16, 32], [32, 16], [32, 32]]
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=grid),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    ids = _ids(processor, image_token_id="<image>", video_token_id="<video>")
    return processor, {"vision_config": {**SQUARE, "vision_use_head": False}, "image_grid_pinpoints": grid, **ids}


FAMILIES = {
    "qwen3_vl": partial(_qwen, "qwen3_vl"),
    "qwen3_5": partial(_qwen, "qwen3_5_think"),
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
}
"""By model type, what makes the processor and what the configuration of the model has to say for it."""


def tiny_processor(family) -> ProcessorMixin:
    """Return the processor of a family's tiny model."""
    return FAMILIES[family]()[0]


def tiny_vision_model(family, dtype=torch.float32):
    """Return a family's tiny random model, in training mode, without dropout, and its processor."""
    processor, whole = FAMILIES[family]()
    class_name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]
    return model_for(class_name, processor.tokenizer, dtype, whole, initializer_range=0.1), processor


def save_vision_checkpoint(family, folder):
    """Write a family's tiny model and processor to a folder, as a checkpoint of the Hub; return its path."""
    model, processor = tiny_vision_model(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def screen(seed, width=16, height=16) -> Image.Image:
    """Return an image of random squares of 4 × 4 pixels; the same seed and size give the same image."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randint(0, 256, (-(-height // 4), -(-width // 4), 3), generator=generator, dtype=torch.uint8)
    pixels = squares.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
    return Image.fromarray(pixels.numpy())
