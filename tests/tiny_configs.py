"""Tiny random models of every causal language model that transformers registers, with each layer type they can have."""

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


VOCAB_SIZE = 97
# Shorter than the samples, so that windows, chunks and blocks cut through histories and branches.
WINDOW = 7

# Set where a config has the attribute.
SIZES = dict(
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unigram_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("lru_width", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "linear_head_dim"), 8),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size", "mamba_d_head"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_length_embed"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("chunk_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("eos_token_id",), 2),
    **dict.fromkeys(("pad_token_id",), VOCAB_SIZE - 1),
    num_kv_shared_layers=0,
    initializer_range=0.2,
    router_aux_loss_coef=0.1,
)

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
MLA = {"num_key_value_heads": 4, "head_dim": 8}
HEADS = {"head_dim": 8}
DECODER = {"is_decoder": True}
ENCODER_DECODER = {"decoder_layers": 2, "encoder_layers": 1, "is_decoder": True, "is_encoder_decoder": False}
GEMMA4 = {"layer_types": [SLIDING, FULL], "global_head_dim": None, "head_dim": 8, "num_global_key_value_heads": None}
# Many heads: with few, scores tie at zero, and which of them is selected is left to chance.
DSA = {**MLA, "index_topk": 5, "index_head_dim": 16, "index_n_heads": 16}

# What a family needs besides: sizes that depend on one another, and the layer types that its default does not show.
OWN = {
    "axk1": MLA,
    "axk2": DSA,
    "bailing_hybrid": {
        **MLA,
        "num_local_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "layer_types": [LINEAR, FULL],
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    "bamba": {"layer_types": [LINEAR, FULL, LINEAR], "num_hidden_layers": 3},
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "camembert": DECODER,
    "data2vec-text": DECODER,
    "deepseek_v2": {**MLA, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": MLA,
    "deepseek_v32": DSA,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "electra": DECODER,
    "ernie": DECODER,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": DSA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "hy_v4": DSA,
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "jamba": {"layer_types": [LINEAR, FULL, LINEAR], "num_hidden_layers": 3},
    "kimi_linear": MLA,
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "megatron-bert": DECODER,
    "minicpm3": MLA,
    "ministral": {**HEADS, "layer_types": [SLIDING, FULL]},
    "nemotron": {**HEADS, "num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mamba", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16,
        "num_hidden_layers": 5,
    },
    "plbart": {"decoder_attention_heads": 4},
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": DECODER,
    "roformer": DECODER,
    "whisper": {"decoder_attention_heads": 4},
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xmod": {**DECODER, "default_language": "en_XX"},
    "youtu": MLA,
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3, "adapter_rank": 4},
    "zaya": {"sliding_window": WINDOW, "num_experts_per_tok": 1, "router_hidden_size": 8, "layer_types": ["hybrid", "hybrid_sliding"]},
}


class CannotBuildError(Exception):
    """A model type of which no tiny model can be made here; the message says why."""


def tiny_model(model_type, **overrides):
    """
    Return a tiny random model in float64 and training mode, without dropout.

    Raises:
        CannotBuildError: If there is no such model here.
    """
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], None)
    config = tiny_config(model_type, **overrides)
    torch.manual_seed(0)
    experts = {"experts_implementation": "eager"} if model_class._can_set_experts_implementation() else {}
    implementation = "sdpa" if model_class._supports_sdpa else "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > 3e6:
        raise CannotBuildError(f"its smallest configuration has {size / 1e6:.0f} million parameters")
    model = model_class._from_config(config, attn_implementation=implementation, dtype=torch.float32, **experts)
    for name, parameter in model.named_parameters():
        if parameter.numel() and not parameter.isfinite().all() or (parameter == 0).all():
            torch.nn.init.normal_(parameter, std=0.2)
    without_dropout(model)
    return model.double().train()


def tiny_config(model_type, **overrides):
    """Return a config of a model type, or of the language model in it."""
    probe = CONFIG_MAPPING[model_type]()
    text = probe.get_text_config(decoder=True)
    sizes = {name: value for name, value in SIZES.items() if _has(text, name)}
    for name, count in (("layer_types", "num_hidden_layers"), ("mlp_layer_types", None)):
        # One layer of each type that the default config has, in the order of their first appearance.
        types = list(dict.fromkeys(getattr(text, name, None) or ()))
        if len(types) > 1:
            sizes |= {name: types} | ({count: len(types)} if count else {})
    own = OWN.get(model_type, {})
    if "layers_block_type" in own:
        sizes.pop("layer_types", None)
    if "layer_types" in own:
        sizes["num_hidden_layers"] = len(own["layer_types"])
    return type(text)(**{**sizes, **own, **overrides})


def _has(config, name):
    return vars(config).get(name) is not None


def without_dropout(model):
    """Set every probability of dropping or jittering to 0, wherever the modules keep it."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and any(word in name for word in ("dropout", "jitter", "layerdrop")):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
