"""Tiny random models of the classes that read images, audio or video besides text, with tiny encoders."""

import importlib
import inspect
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel

from support import tiny_causal_lms
from support.tiny_model_builder import initialised


# Sizes that only parts for other media have, set where a part has them.
MEDIA_SIZES = {"out_hidden_size": 32, "num_position_embeddings": 16, "image_size": 32, "text_hidden_size": 32}
MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 1.0,
    }
}
# What a part needs besides, by its model type: sizes that depend on one another.
OWN = {
    "cosmos3_edge_text": MROPE,
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flow_head_config": {"condition_dim": 32},
    "glm4v_text": MROPE,
    "glm4v_moe_text": MROPE,
    "glm_ocr_text": MROPE,
    "glm_image_text": {**MROPE, "vision_vocab_size": 64},
    "glm_image_vqmodel": {"embed_dim": 16, "num_embeddings": 64, "latent_channels": 16},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    "qwen2_5_vl_text": MROPE,
    "molmo2_vision": {"image_size": [28, 28], "num_position_embeddings": 4, "num_key_value_heads": 4},
    "molmo2_adapter": {"vision_feature_layer": [1, 0], "num_key_value_heads": 4},
    "muse_glimmer": {"projector_hidden_size": 16},
    "muse_glimmer_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "muse_spark": {"projector_hidden_size": 16, "out_hidden_size": 32},
    "muse_spark_audio": {"hidden_sizes": [8, 8], "depths": [1, 1], "patch_sizes": [4, 4], "num_hidden_layers": 2},
    "muse_spark_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "muse_spark_text": {"moe_hidden_size": 16},
}
# Checked to fail, so that the list stays true.
CANNOT_BE_BUILT = {
    "CohereCompassForConditionalGeneration": "its configuration lacks the RoPE of one of its layer types",
    "Gemma3nForConditionalGeneration": "its vision encoder needs `timm`; the text model `gemma3n_text` is exact",
    "InklingForConditionalGeneration": "its vision encoder needs SciPy; the text model `inkling_text` is exact",
}


@cache
def classes_without_loss_arguments():
    """
    Return the names of the generating classes whose models say `accepts_loss_kwargs = False`.

    The Trainer hands these no number of items, so that each of its batches is averaged by itself.
    """
    names = set()
    for path in Path(transformers.models.__file__).parent.glob("*/modeling_*.py"):
        if "accepts_loss_kwargs" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        names |= {value.__name__ for value in vars(module).values() if _says_so(value) and _generates(value)}
    return sorted(names)


def _says_so(value):
    return inspect.isclass(value) and issubclass(value, PreTrainedModel) and not _accepts_loss_arguments(value)


def _accepts_loss_arguments(model_class):
    return getattr(model_class, "accepts_loss_kwargs", True)


def _generates(model_class):
    return issubclass(model_class, GenerationMixin)


def tiny_conditional(class_name, vocab_size=tiny_causal_lms.VOCAB_SIZE, dtype=torch.float64, **overrides):
    """
    Return a tiny random model of a class, in training mode, without dropout.

    Args:
        class_name (`str`):
            Class of transformers.
        vocab_size (`int`, *optional*):
            Number of tokens that its text model knows.
        dtype (`torch.dtype`, *optional*):
            Type of its parameters; they are drawn in float32 whatever it is.
        **overrides:
            Arguments of the text model's configuration.

    Raises:
        CannotBuildError: If there is no such model here.
    """
    model_class = getattr(transformers, class_name)
    probe = model_class.config_class()
    text = probe.get_text_config()
    sizes = {name: vocab_size for name in ("vocab_size", "vocab_size_per_layer_input") if hasattr(text, name)}
    config = _sized(probe, text, sizes | overrides)
    config.get_text_config()._experts_implementation = "eager"  # not every class passes it to its text model
    return initialised(model_class, config, dtype)


def model_for(class_name, tokenizer):
    """Return a tiny float32 model of any of these classes, with the tokens of a tokenizer."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tiny_conditional(class_name, len(tokenizer), torch.float32, initializer_range=0.05, **ids)


def _sized(probe, text, overrides):
    """Return a configuration with tiny parts; overrides apply to the text model."""
    parts = {
        name: _sized(getattr(probe, name), text, overrides)
        for name in probe.sub_configs
        if getattr(probe, name, None) is not None
    }
    own = OWN.get(probe.model_type or probe.base_config_key, {})
    media = {name: size for name, size in MEDIA_SIZES.items() if name in vars(probe)}
    return tiny_causal_lms.sized(probe, probe.model_type, media | own | parts | (overrides if probe is text else {}))
