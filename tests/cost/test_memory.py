"""Counted bytes: what a model keeps, and how many ranks share a row."""

import pytest
import torch
from transformers import Qwen3Config

from benchmarks.balance_at_scale import MODEL
from support.tiny_models import tiny_model
from trl_singlepass.cost.memory import ActivationBytes, exchange_bytes, exchange_share, row_bytes, smallest_group


def test_a_layer_keeps_what_is_counted():
    """In bf16, but for attention, which keeps more on a CPU: the row is short, and the layer wide."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = tiny_model("qwen3", hidden_size=256, intermediate_size=512, **sizes, attn_implementation="sdpa")
    model, kept = model.to(torch.bfloat16), {}

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor  # held, so that no other takes its place
        return tensor

    hidden = torch.randn(1, 16, 256, dtype=torch.bfloat16, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(16)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](hidden, position_embeddings=rotary)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted = row_bytes(model.config, 16) - 2 * model.config.num_hidden_layers * 256 * 16
    assert counted == pytest.approx(measured, rel=0.02)


def test_rows_of_documented_length_fit_into_documented_groups():
    assert row_bytes(MODEL, 65536) == pytest.approx(2 * 65536 * 36 * 4096, rel=0.8)
    assert row_bytes(MODEL, 65536, 4) == pytest.approx(row_bytes(MODEL, 65536) / 4)
    assert [smallest_group(MODEL, tokens, 40e9) for tokens in (8192, 32768, 131072, 524288)] == [1, 1, 2, 8]
    assert smallest_group(MODEL, 10**8, 40e9) is None


def test_long_rows_exchange_for_less_of_their_time():
    shares = [
        exchange_share(MODEL, tokens, tokens**2 // 2, 8, flops=4e14, bandwidth=3e11) for tokens in (8192, 131072)
    ]
    assert shares[1] < shares[0] / 2
    assert exchange_bytes(MODEL, 8192, 1) == 0


def test_bytes_per_token_are_those_of_the_memory_page():
    config = Qwen3Config(
        num_hidden_layers=6,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    assert ActivationBytes.from_config(config, 4, checkpointing=False) == ActivationBytes(344_256, 12_288)
    per_layer, between_layers = 344_256 // 6, 6 * 512 * 4
    assert ActivationBytes.from_config(config, 4, checkpointing=True).per_token == per_layer + between_layers
