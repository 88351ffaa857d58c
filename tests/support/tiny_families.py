"""Tiny random models of the families for which the project promises exactness."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


VOCAB_SIZE = 97
# Shorter than the samples of the tests, so that windows and chunks cut through histories and branches.
WINDOW = 7
ALTERNATING = ["sliding_attention", "full_attention"]
MOE = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
EAGER_EXPERTS = {"experts_implementation": "eager"}  # the grouped kernels have no float64

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "qwen2-sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"head_dim": 8, "num_local_experts": 4, "sliding_window": WINDOW, "layer_types": ALTERNATING, **MOE},
    ),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, **MOE},
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig,
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            # Temperature tuning depends on positions from this many tokens on.
            "floor_scale": 4,
        },
    ),
}

MIXTURES = [name for name, (_, _, own) in FAMILIES.items() if "output_router_logits" in own]


def tiny_model(family, vocab_size=VOCAB_SIZE, dtype=torch.float64, attn_implementation="eager", **overrides):
    """Return a random two-layer model without dropout, in training mode."""
    model_class, config_class, own = FAMILIES[family]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "pad_token_id": vocab_size - 1,  # transformers zeroes the embedding of this token and its gradient
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Larger than usual: at 0.02, attention is nearly uniform, and a wrong mask or position would hardly show.
        "initializer_range": 0.2,
    }
    experts = EAGER_EXPERTS if model_class._can_set_experts_implementation() else {}
    config = config_class(**{**sizes, **own, **overrides}, attention_dropout=0.0)
    torch.manual_seed(0)
    # Drawn in float32 whatever the dtype, so that all dtypes get the same weights.
    model = model_class._from_config(config, attn_implementation=attn_implementation, dtype=torch.float32, **experts)
    for name, parameter in model.named_parameters():
        if "sinks" in name or "bias" in name:  # zero or unset initially, which would test nothing
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).train()
