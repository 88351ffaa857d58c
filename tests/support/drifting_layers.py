"""Layers and models that a small row does not show to be wrong: longer rows, training mode, gradients, later steps."""

import torch
from torch import nn

from support.planted_layers import PlantedMLP, qwen3


class PoolsLongRows(PlantedMLP):
    """Reads the mean of a row above 100 tokens."""

    def mix(self, x):
        return x.mean(1, keepdim=True) if x.shape[1] > 100 else 0 * x


class SwitchesAtIndex(PlantedMLP):
    def mix(self, x):
        return 0.5 * x * (torch.arange(x.shape[1], device=x.device) >= 128)[:, None]


class NormalizesTokens(PlantedMLP):
    """BatchNorm over tokens in training, over what it has seen in evaluation."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.hidden_size)

    def mix(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class FaintMemory(PlantedMLP):
    """An embedding by index below rounding, which is trained."""

    def __init__(self, config):
        super().__init__(config)
        self.memory = nn.Parameter(1e-7 * torch.randn(4096, config.hidden_size))

    def mix(self, x):
        return self.memory[: x.shape[1]]


class _MixedGradient(torch.autograd.Function):
    """A product whose weight gets the gradient of all tokens, mixed."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        mixed = 0.9 * grad + 0.1 * grad.mean(1, keepdim=True)
        return grad @ weight, mixed.flatten(0, 1).T @ x.flatten(0, 1)


class MixesGradients(qwen3.Qwen3MLP):
    strength = 1.0

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * _MixedGradient.apply(x, self.up_proj.weight))


class _ClippedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + grad.norm() / 1e-2)


class ClipsGradients(qwen3.Qwen3MLP):
    """Clips a gradient by its norm over the row."""

    strength = 1.0

    def forward(self, x):
        return super().forward(_ClippedGradient.apply(x))


class ActsLater(PlantedMLP):
    """Pools the row from some forward in training on."""

    count = 0

    def mix(self, x):
        self.count += self.training
        return x.mean(1, keepdim=True) if self.count > 40 else 0 * x


DRIFTING = {
    layer.__name__: layer
    for layer in (*(PoolsLongRows, SwitchesAtIndex, NormalizesTokens, FaintMemory, MixesGradients, ClipsGradients),)
}
