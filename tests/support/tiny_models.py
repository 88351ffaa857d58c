"""Tiny random models: of the families that the project names, and of every causal model type in transformers."""

import inspect

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.slow import slow_but_for


VOCAB_SIZE = 97
# Shorter than the samples, so that windows, chunks and blocks cut through histories and branches.
WINDOW = 7
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
WITHOUT_WINDOW = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
# As E2B and E4B: the last layers read keys and values of earlier ones.
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
}
# Model type of each family, and what it sets besides the sizes below.
FAMILIES = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", WITHOUT_WINDOW),
    "qwen2-sliding": ("qwen2", {"layer_types": [FULL, SLIDING]}),
    "mistral-sliding": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma4": ("gemma4_text", SHARED_KEYS),
    "gpt-oss": ("gpt_oss", BALANCED),
    "qwen3-moe": ("qwen3_moe", {**BALANCED, **WITHOUT_WINDOW, "head_dim": 8}),
    # Temperature tuning depends on positions from `floor_scale` tokens on.
    "llama4": (
        "llama4_text",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "no_rope_layers": [1, 0], "floor_scale": 4},
    ),
}
MIXTURES = [name for name, (_, own) in FAMILIES.items() if "output_router_logits" in own]
# What reentrant checkpointing cuts off the graph, in stock training too, so that there is no gradient to compare.
CUT_OFF = {name: {"output_router_logits": False} for name in MIXTURES} | {"gemma4": {"num_kv_shared_layers": 0}}

# Models with recurrent, convolutional or selecting layers.
HYBRIDS = [
    *("bailing_hybrid", "bamba", "deepseek_v32", "falcon_h1", "glm_moe_dsa", "granitemoehybrid", "inkling_text"),
    *("jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma"),
    *("zamba", "zamba2", "zaya"),
]
# One of each way to run: states at forks (delta rule, state space), convolution tails, whole paths, selected tokens.
KINDS = ["qwen3_5_text", "bamba", "lfm2", "jamba", "deepseek_v32"]
# One of each kind, and one whose layers take over what earlier ones selected; the others are tried by the slow tests.
HYBRIDS_AND_SLOW = slow_but_for([*KINDS, "glm_moe_dsa"], HYBRIDS)

# Set where a config has the attribute.
SIZES = {
    name: size
    for names, size in (
        ("vocab_size unpadded_vocab_size vocab_size_per_layer_input unigram_vocab_size", VOCAB_SIZE),
        ("hidden_size d_model n_embd dim word_embed_proj_dim embedding_size lru_width emb_dim", 32),
        ("intermediate_size ffn_dim n_inner intermediate_size_mlp decoder_ffn_dim encoder_ffn_dim", 48),
        ("num_hidden_layers n_layer num_layers n_layers decoder_layers num_blocks", 2),
        ("num_decoder_layers encoder_layers depth", 2),
        ("num_attention_heads n_head n_heads decoder_attention_heads num_heads encoder_attention_heads", 4),
        ("num_decoder_attention_heads linear_num_heads", 4),
        ("num_key_value_heads linear_num_key_heads linear_num_value_heads", 2),
        ("head_dim global_head_dim linear_key_head_dim linear_value_head_dim rotary_dim", 8),
        ("qk_rope_head_dim qk_nope_head_dim v_head_dim query_pre_attn_scalar swa_head_dim swa_v_head_dim", 8),
        ("hidden_size_per_layer_input laurel_rank linear_head_dim", 8),
        ("q_lora_rank kv_lora_rank moe_intermediate_size shared_intermediate_size", 16),
        ("shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_head", 16),
        ("max_position_embeddings n_positions n_ctx max_seq_len max_length_embed", 256),
        ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
        ("num_experts_per_tok moe_topk moe_k num_experts_per_token", 2),
        ("n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups", 1),
        ("sliding_window attention_chunk_size attention_window_size", WINDOW),
        ("mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size time_step_rank mamba_dt_rank", 8),
        ("mamba_n_heads mamba_num_heads n_mamba_heads", 4),
        ("num_kv_shared_layers", 0),
        ("bos_token_id", 1),
        ("eos_token_id", 2),
        ("pad_token_id", VOCAB_SIZE - 1),  # transformers zeroes the embedding of this token and its gradient
        # Larger than usual: at 0.02, attention is nearly uniform, and a wrong mask or position would hardly show.
        ("initializer_range", 0.2),
    )
    for name in names.split()
}

MLA = {"num_key_value_heads": 4, "head_dim": 8}
HEADS = {"head_dim": 8}
DECODER = {"is_decoder": True}
# Many heads: with few, scores tie at zero, and which of them is selected is left to chance.
DSA = {**MLA, "index_topk": 5, "index_head_dim": 16, "index_n_heads": 16}

QWEN4 = {
    "layer_types": [LINEAR, "indexed_attention"],
    "eos_token_id": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
    "ple_conv_kernel_size": 3,
    "hc_lowrank": 4,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 6,
    "indexer_compress_ratio": 2,
}

DOTS3 = {
    **DSA,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}

# Made decoders.
ENCODERS = [
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
    *("roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"),
]
# What a family needs besides: sizes that depend on one another, and the layer types that its default does not show.
OWN = {
    **dict.fromkeys(ENCODERS, DECODER),
    **dict.fromkeys(["axk1", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "minicpm3", "sarvam_mla", "youtu"], MLA),
    **dict.fromkeys(["axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"], DSA),
    "bailing_hybrid": {
        **MLA,
        "num_local_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "layer_types": [LINEAR, FULL],
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "deepseek_v2": {**MLA, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    "dots3_note": DOTS3,
    "dots3_note_text": DOTS3,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL, LINEAR]},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 3},
    "kolibri1_1": {
        "head_dim": 16,
        "index_num_heads": 2,
        "index_topk": 3,
        "index_pool_size": 4,
        "index_compression": 2,
        "index_num_local_tokens": 2,
        "index_num_sink_tokens": 1,
        "mlp_only_layers": [0],
    },
    "lfm2": {"layer_types": ["conv", FULL, "conv"]},
    "longcat_flash": {**MLA, "ffn_hidden_size": 48, "qk_head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
    },
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
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "reformer": {**DECODER, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 16], "attn_layers": ["local"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 3},
    "roc_bert": {
        **DECODER,
        "pad_token_id": 0,
        "shape_vocab_size": 97,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 97,
        "pronunciation_embed_dim": 8,
    },
    "whisper": {"decoder_attention_heads": 4},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3, "adapter_rank": 4},
    "zaya": {
        "sliding_window": WINDOW,
        "num_experts_per_tok": 1,
        "router_hidden_size": 8,
        "layer_types": ["hybrid", "hybrid_sliding"],
    },
}


# Checked to fail, so that the list stays true.
CANNOT_BE_BUILT = {
    "blt": "its n-gram hash tables alone have 3 billion parameters",
    "cohere_compass_text": "its configuration lacks the RoPE of one of its layer types",
    "dbrx": "its configuration takes a part of itself for the text model's",
    "gemma3n": "its vision encoder needs `timm`; the text model `gemma3n_text` is exact",
    "gemma4_assistant": "it drafts tokens from another model's states and is not trained on text",
    "git": "its vision encoder takes no configuration and has 86 million parameters",
    "phi4_multimodal": "its audio and vision encoders have 870 million parameters",
}


class CannotBuildError(Exception):
    """No tiny model of a model type can be built; the message says why."""


def tiny_model(family, vocab_size=VOCAB_SIZE, dtype=torch.float64, attn_implementation="eager", **overrides):
    """Return a random two-layer model of a family, in training mode, without dropout."""
    model_type, own = FAMILIES[family]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": vocab_size - 1}
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": 8192}
    config = tiny_config(model_type, **{**sizes, **ids, **own, **overrides})
    # Sinks and biases of routers have to be as large as what they compete with.
    return random_model(model_class_of(model_type), config, dtype, std=0.5, attn_implementation=attn_implementation)


def without_router_loss(name, **overrides):
    """Return a tiny model of a family or type without its load-balancing loss, which is no sum over tokens."""
    model = (tiny_model if name in FAMILIES else model_of_type)(name, **overrides)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model


def model_of_type(model_type, **overrides):
    """
    Return a tiny random model of a model type in float64 and training mode, without dropout.

    Raises:
        CannotBuildError: If there is no such model here.
    """
    return tiny_model_of_class(model_class_of(model_type), tiny_config(model_type, **overrides))


def tiny_model_of_class(model_class, config, dtype=torch.float64):
    """
    Return a random model of a tiny configuration, with a load-balancing loss if it can compute one.

    Raises:
        CannotBuildError: If the configuration is not tiny.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > 3e6:
        raise CannotBuildError(f"its smallest configuration has {size / 1e6:.0f} million parameters")
    model = random_model(model_class, config, dtype)
    if has_auxiliary_loss(model):
        text = model.config.get_text_config()
        text.output_router_logits, text.router_aux_loss_coef = True, 0.1
    return model


def random_model(model_class, config, dtype, std=0.2, **kwargs):
    """Return a random model, in training mode, without dropout; all dtypes get the same weights."""
    torch.manual_seed(0)
    if model_class._can_set_experts_implementation():
        kwargs["experts_implementation"] = "eager"  # the grouped kernels have no float64
    model = model_class._from_config(config, dtype=torch.float32, **kwargs)
    for parameter in model.parameters():  # a bias or position of zero would test nothing
        if (parameter.numel() and not parameter.isfinite().all()) or (parameter == 0).all():
            torch.nn.init.normal_(parameter, std=std)
    without_dropout(model)
    return model.to(dtype).train()


def has_auxiliary_loss(model):
    """Whether a model computes a load-balancing loss over its experts."""
    forward = inspect.unwrap(type(model).forward)
    is_mixture = any("router" in name or "experts" in name for name, _ in model.named_modules())
    return is_mixture and "load_balancing_loss_func" in forward.__code__.co_names


def without_dropout(model):
    """Set every probability of dropout, drop path and jitter to 0, in whatever attribute modules keep it."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and any(
                word in name for word in ("dropout", "drop_prob", "jitter", "layerdrop")
            ):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def tiny_config(model_type, **overrides):
    """Return a config of a model type, with those of its encoders of other media if its model has them."""
    probe = CONFIG_MAPPING[model_type]()
    text = probe.get_text_config(decoder=True)
    # Encoder-decoders return a copy with different names, and some models use the name of a part for something else.
    if type(text) is type(probe) or not {"text_config", "decoder"} & set(probe.sub_configs):
        return sized(probe, model_type, overrides)
    tiny_text = sized(text, model_type, overrides)
    if model_class_of(model_type).config_class is not type(probe):
        return tiny_text
    parts = {name: sized(getattr(probe, name)) for name in probe.sub_configs if getattr(probe, name) is not None}
    own_name = next(name for name in parts if type(getattr(probe, name)) is type(text))
    return type(probe)(**parts | {own_name: tiny_text})


def sized(probe, model_type=None, overrides=None):
    """Return a configuration with tiny sizes and one layer of each type."""
    sizes = {name: value for name, value in SIZES.items() if _has(probe, name)}
    for name, count in (("layer_types", "num_hidden_layers"), ("mlp_layer_types", None)):
        # One layer of each type in the default config, in the order of first appearance.
        types = list(dict.fromkeys(getattr(probe, name, None) or ()))
        if len(types) > 1 and not isinstance(getattr(type(probe), name, None), property):
            sizes |= {name: types} | ({count: len(types)} if count else {})
    own = OWN.get(model_type, {})
    if "use_sliding_window" in vars(probe):
        sizes |= {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [SLIDING, FULL]}
    elif "sliding_window" in vars(probe):
        sizes["sliding_window"] = WINDOW
    if {"layers_block_type", "block_types"} & set(own):
        sizes.pop("layer_types", None)
    if "layer_types" in own:
        sizes["num_hidden_layers"] = len(own["layer_types"])
    return type(probe)(**{**sizes, **own, **(overrides or {})})


def model_class_of(model_type):
    """Return the class that `AutoModelForCausalLM` takes for a model type."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _has(config, name):
    return vars(config).get(name) is not None
