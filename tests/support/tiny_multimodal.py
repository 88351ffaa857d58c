"""Tiny random models of the classes that read images, audio or video besides text, with tiny encoders."""

import importlib
import inspect
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel

from support import tiny_models
from support.tiny_models import tiny_model_of_class


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
SAM = {"output_channels": 16, "mlp_dim": 16, "window_size": 2, "num_pos_feats": 8, "global_attn_indexes": [1]}
VQGAN = {"embed_dim": 16, "num_embeddings": 64, "latent_channels": 16, "base_channels": 32, "channel_multiplier": [1]}
# What a part needs besides, by its model type: sizes that depend on one another. A whole may speak for its parts.
OWN = {
    "apertus1p5": {"image_token_id": 95, "audio_token_id": 94, "image_token_offset": 90, "audio_token_offset": 92},
    "apertus1p5_vision_tokenizer": {
        "codebook_size": 2,
        "embed_dim": 16,
        "latent_channels": 16,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "spatial_scale_factor": 1,
    },
    "wavtokenizer_encoder": {
        "hidden_size": 32,
        "codebook_dim": 32,
        "codebook_size": 2,
        "num_filters": 8,
        "upsampling_ratios": [2],
        "decoder_hidden_size": 32,
        "decoder_intermediate_size": 32,
        "decoder_num_layers": 1,
    },
    # Its logits of the tokens of images are -inf, so these stand behind those of the samples.
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGAZ": 93, "IMGIMGBZ": 94}},
    "aria": {"projector_patch_to_query_dict": {1: 1, 4: 2}},
    "chameleon_vqgan": {**VQGAN, "num_embeddings": 2},
    "vipllava": {"vision_feature_layer": [-2, 1]},
    "kimi_k25": {"projection_hidden_size": 32},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "deepseek_ocr2_sam_vision_model": {**SAM, "downsample_channels": [16, 32]},
    "deepseek_ocr2_text": {
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "diffusion_gemma": {"canvas_length": 8},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "emu3": {
        "vocabulary_map": {
            "<image>": 90,
            "<|extra_200|>": 95,
            "<|visual token 000000|>": 93,
            "<|visual token 000001|>": 94,
        }
    },
    "emu3_vqgan": {**VQGAN, "codebook_size": 2, "attn_resolutions": []},
    "florence_vision": {
        "depths": [1],
        "patch_size": [4],
        "patch_stride": [4],
        "patch_padding": [0],
        "patch_prenorm": [False],
        "embed_dim": [16],
        "num_heads": [2],
        "num_groups": [2],
        "window_size": 2,
        "projection_dim": 32,
    },
    "gemma4_unified": {
        "vision_config": {
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "model_patch_size": 8,
            "mm_embed_dim": 16,
            "mm_posemb_size": 8,
            "output_proj_dims": 16,
        }
    },
    "granite_docling_vision": {"patch_size": 8, "deepstack_visual_indexes": [0, 1]},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[1, 0]],
        "spatial_target_layers": [1],
    },
    "hunyuan_vl_text": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]},
    },
    "hunyuan_vl_vision": {"max_image_size": 32, "min_image_size": 16, "img_max_token_num": 16, "max_vit_seq_len": 64},
    "hy_v4_vl_text": {
        **tiny_models.DSA,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "idefics_vision": {"embed_dim": 32, "image_size": 28},
    "idefics_perciever": {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2},
    "janus_vqgan": {**VQGAN, "projection_dim": 32, "image_token_embed_dim": 32, "num_patches": 2},
    "janus_vision_model": {"projection_dim": 32, "patch_size": 8},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos_2_text_model": {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "kosmos_2_5_text_model": {"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 32, "max_num_patches": 16},
    "llama4_vision_model": {
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "image_size": 28,
        "intermediate_size": 128,
    },
    "mistral4": {
        **tiny_models.MLA,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 4,  # the temperature of attention changes every so many tokens
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral_large4": {"spatial_merge_size": 1},
    "mistral_large4_text": tiny_models.DSA,
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "projector_hidden_size": 32,
        "vision_hidden_size": 32,
    },
    "paddleocr_vl_text": MROPE,
    "paddleocr_vl_vision": {"image_size": 28},
    "pp_formulanet_vision": {
        **SAM,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 16,
        "decoder_hidden_size": 32,
    },
    "llava_onevision": {
        "image_grid_pinpoints": [[32, 32], [32, 64]],
        "vision_config": {"vision_use_head": False},
    },
    "llava_next": {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    "minicpm_ocr": {"insert_layer_id": 0},
    "minicpmv4_6": {"insert_layer_id": 0},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 91},
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_omni_audio_encoder": {"output_dim": 32, "max_source_positions": 16},
    "qwen2_vl_text": MROPE,
    "qwen2_vl_vision": {"embed_dim": 32},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 91},
    "qwen3_omni_moe_text": MROPE,
    "qwen3_omni_moe_vision_encoder": {"deepstack_visual_indexes": [0, 1]},
    "qwen3_omni_moe_audio_encoder": {"output_dim": 32, "downsample_hidden_size": 8, "max_source_positions": 16},
    "sam_vision_model": SAM,
    "unlimited_ocr_sam_vision_model": {**SAM, "downsample_channels": [16, 32]},
    "unlimited_ocr_text": {"mlp_layer_types": ["dense", "sparse"]},
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
    "qwen2_5_vl_vision": {"fullatt_block_indexes": [1], "window_size": 28},
    "qwen3_vl_text": MROPE,
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0, 1]},
    "qwen3_vl_moe_text": MROPE,
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0, 1]},
    "qwen3_5_text": MROPE,
    "qwen3_5_moe_text": MROPE,
    "gemma3": {"mm_tokens_per_image": 4, "vision_config": {"patch_size": 8, "vision_use_head": False}},
    "gemma4_text": {"use_bidirectional_attention": "vision", **tiny_models.SHARED_KEYS},
    "gemma4": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        }
    },
    "idefics3": {"scale_factor": 2, "vision_config": {"patch_size": 16}},
    "smolvlm": {"scale_factor": 2, "vision_config": {"patch_size": 16}},
    "mistral3": {"vision_config": {"patch_size": 4}},
    "molmo2_vision": {"image_size": [28, 28], "num_position_embeddings": 4, "num_key_value_heads": 4},
    "molmo2_adapter": {"vision_feature_layer": [1, 0], "num_key_value_heads": 4},
    "muse_glimmer": {"projector_hidden_size": 16, "out_hidden_size": 128},
    "muse_glimmer_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "muse_spark": {"projector_hidden_size": 16, "out_hidden_size": 128},
    "muse_spark_audio": {"hidden_sizes": [8, 8], "depths": [1, 1], "patch_sizes": [4, 4], "num_hidden_layers": 2},
    "muse_spark_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "muse_spark_text": {"moe_hidden_size": 16},
}
# Checked to fail, so that the list stays true.
CANNOT_BE_BUILT = {
    "CohereCompassForConditionalGeneration": "its configuration lacks the RoPE of one of its layer types",
    "Gemma3nForConditionalGeneration": "its vision encoder needs `timm`; the text model `gemma3n_text` is exact",
    "FastVlmForConditionalGeneration": "its vision encoder needs `timm`",
    "PerceptionLMForConditionalGeneration": "its vision encoder needs `timm`",
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


def tiny_conditional(class_name, vocab_size=tiny_models.VOCAB_SIZE, dtype=torch.float64, whole=None, **overrides):
    """
    Return a tiny random model of a class, in training mode, without dropout.

    `whole` are arguments of its configuration, `overrides` those of the text model's. Parameters are drawn in float32,
    whatever `dtype` is. Raises `CannotBuildError` if there is no such model here.
    """
    model_class = getattr(transformers, class_name)
    probe = model_class.config_class()
    text = probe.get_text_config()
    sizes = {name: vocab_size for name in ("vocab_size", "vocab_size_per_layer_input") if hasattr(text, name)}
    config = _sized(probe, text, sizes | overrides, whole)
    config.get_text_config()._experts_implementation = "eager"  # not every class passes it to its text model
    return tiny_model_of_class(model_class, config, dtype)


def model_for(class_name, tokenizer, dtype=torch.float32, whole=None, initializer_range=0.05):
    """Return a tiny model of any of these classes, with the tokens of a tokenizer."""
    own = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    own |= {"initializer_range": initializer_range, "max_position_embeddings": 8192}
    return tiny_conditional(class_name, len(tokenizer), dtype, whole, **own)


def _sized(probe, text, overrides, from_whole=None):
    """Return a configuration with tiny parts; overrides apply to the text model."""
    own = OWN.get(probe.model_type or probe.base_config_key, {}) | (from_whole or {})
    parts = {
        name: _sized(getattr(probe, name), text, overrides, own.get(name))
        for name in probe.sub_configs
        if getattr(probe, name, None) is not None
    }
    media = {name: size for name, size in MEDIA_SIZES.items() if name in vars(probe)}
    sizes = media | own | parts | (overrides if probe is text else {})
    return tiny_models.sized(probe, probe.model_type, sizes)
