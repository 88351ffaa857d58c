"""Layers that mix the tokens of a row in ways that no code of the package names, and that a single pass gets wrong."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from support.tiny_models import tiny_model


def qwen3_model(dtype=torch.float32, vocab_size=1000):
    """Return a small model of attention and MLPs."""
    return tiny_model("qwen3", vocab_size, dtype, "sdpa")


class PlantedMLP(qwen3.Qwen3MLP):
    """An MLP that reads `mix` of its inputs besides; `strength` scales the mixture."""

    strength = 1.0

    def forward(self, x):
        return super().forward(x + self.strength * self.mix(x))


class TokenShift(PlantedMLP):
    """As RWKV and Canon layers have it."""

    def mix(self, x):
        return 0.5 * (F.pad(x[:, :-1], (0, 0, 1, 0)) - x)


class IndexDependent(PlantedMLP):
    """Depends on the token's place in the sequence, and on no other token."""

    def mix(self, x):
        place = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        return x * (0.1 * torch.sin(place / 7)).to(x.dtype)[:, None]


class MemoryByIndex(PlantedMLP):
    """Reads a learned memory at the token's place in the sequence."""

    def __init__(self, config):
        super().__init__(config)
        self.memory = nn.Parameter(0.15 * torch.randn(256, config.hidden_size))

    def mix(self, x):
        return self.memory[torch.arange(x.shape[1], device=x.device) % len(self.memory)]


class BatchPooling(PlantedMLP):
    def mix(self, x):
        return x.mean((0, 1), keepdim=True)


class NeighbourRouter(qwen3.Qwen3MLP):
    """Gates a token by the one before it."""

    strength = 1.0

    def forward(self, x):
        gate = torch.sigmoid(4 * self.strength * F.pad(x[:, :-1], (0, 0, 1, 0))[..., :1])
        return 2 * gate * super().forward(x)


class ZeroGate(qwen3.Qwen3MLP):
    """A token shift behind a gate that starts at zero: without effect until it is trained."""

    strength = 1.0

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return super().forward(x + self.gate * F.pad(x[:, :-1], (0, 0, 1, 0)))


class OwnAttention(qwen3.Qwen3Attention):
    """Calls PyTorch's attention itself, beside layers that take theirs from transformers."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = qwen3.apply_rotary_pos_emb(query, key, *position_embeddings)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


class NGramEmbedding(nn.Embedding):
    """Adds an embedding of three token ids in a row, which are mixed before any gradient sees them."""

    strength = 1.0

    def forward(self, ids):
        before, earlier = F.pad(ids[:, :-1], (1, 0)), F.pad(ids[:, :-2], (2, 0))
        of_three = (7 * ids + 13 * before + 29 * earlier) % self.num_embeddings
        return super().forward(ids) + 0.5 * self.strength * super().forward(of_three)


PLANTED = {
    layer.__name__: layer
    for layer in (
        *(TokenShift, IndexDependent, NGramEmbedding),
        *(MemoryByIndex, BatchPooling, NeighbourRouter, ZeroGate),
    )
}


def plant(model, name, strength=1.0):
    """Put a planted layer (a name or a class) into a model of `qwen3_model` or `float32_model`, and return both."""
    kind, torch_state = PLANTED.get(name, name), torch.random.get_rng_state()
    torch.manual_seed(1)
    owner, place = model.model.layers[-1], "mlp"
    if kind is NGramEmbedding:
        owner, place = model.model, "embed_tokens"
        planted = kind(model.config.vocab_size, model.config.hidden_size)
    elif kind is OwnAttention:
        place, planted = "self_attn", kind(model.config, len(model.model.layers) - 1)
    else:
        planted = kind(model.config)
    planted.strength = strength
    planted.load_state_dict(getattr(owner, place).state_dict(), strict=False)
    setattr(owner, place, planted.to(next(model.parameters()).dtype))
    torch.random.set_rng_state(torch_state)
    return model, f"{'model' if owner is model.model else f'model.layers.{len(model.model.layers) - 1}'}.{place}"
