"""Configurations of released models, written out: random weights in these shapes need no network."""

from typing import Any

import torch
import transformers
from transformers import GptOssConfig, PreTrainedConfig, Qwen3_5TextConfig, Qwen3Config


QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072}
# Architecture, sizes, and the period with which the types of layers repeat.
MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], int]] = {
    "Qwen3-0.6B": (
        Qwen3Config,
        {**QWEN3, "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
         "tie_word_embeddings": True},
        1,
    ),
    "Qwen3-8B": (
        Qwen3Config,
        {**QWEN3, "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12_288,
         "num_attention_heads": 32},
        1,
    ),
    "Qwen3-32B": (
        Qwen3Config,
        {**QWEN3, "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 25_600,
         "num_attention_heads": 64},
        1,
    ),
    "gpt-oss-20b": (
        GptOssConfig,
        {"vocab_size": 201_088, "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
         "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131_072},
        2,
    ),
    "Qwen3.5-4B": (
        Qwen3_5TextConfig,
        {"vocab_size": 248_320, "num_hidden_layers": 32, "hidden_size": 2560, "intermediate_size": 9216,
         "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
         "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
         "max_position_embeddings": 262_144, "tie_word_embeddings": True},
        4,
    ),
}  # fmt: skip


def get_config(name: str, num_layers: int | None = None, **sizes: Any) -> PreTrainedConfig:
    """Return the configuration of a model, or of so many of its layers, with some sizes replaced."""
    config_class, released, _ = MODELS[name]
    layers = {} if num_layers is None else {"num_hidden_layers": num_layers}
    return config_class(**{**released, **layers, **sizes})


def make_model(config: PreTrainedConfig, attention: str | None, device: str, checkpointing: bool = True) -> Any:
    """Return a model with random weights in bfloat16, in training mode."""
    torch.manual_seed(0)
    model_class = getattr(transformers, type(config).__name__.replace("TextConfig", "Config")[:-6] + "ForCausalLM")
    with torch.device(device):
        model = model_class._from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
