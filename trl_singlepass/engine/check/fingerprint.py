"""What a model was when it was measured, in terms that are read once per step: by identity, without its tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checked_model import unwrapped


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PLAIN = (bool, int, float, str)
_MODES = {"training", "gradient_checkpointing"}  # which the Trainer changes between steps


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """
    What a model computes with: `structure` changes with its code, `values` with what its modules count or switch.

    Of each module, structure holds its class, the forward of the class and of its own, its hooks, its adapters, and
    which of its parameters are trained, in which dtype; of the model, its configuration of attention and RoPE.
    """

    structure: tuple[Any, ...] = ()
    values: tuple[Hashable, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """Read a model, about 2 µs per module."""
        structure: list[Any] = []
        values: list[Hashable] = []
        stack: list[Any] = [unwrapped(model)]
        while stack:
            module = stack.pop()
            if module is None:
                continue
            own, kind = module.__dict__, module.__class__
            structure += (
                kind,
                kind.forward,
                own.get("forward"),
                tuple([len(own[name]) for name in _HOOKS]),
                str(own.get("_active_adapter")),
                str(own.get("merged_adapters")),
                tuple([x is not None and (x.requires_grad, x.dtype) for x in own["_parameters"].values()]),
            )
            values += [x for name, x in own.items() if x.__class__ in _PLAIN and name not in _MODES]
            if config := own.get("config"):
                text = config.get_text_config() if hasattr(config, "get_text_config") else config
                names = ("_attn_implementation", "_experts_implementation", "rope_parameters")
                structure.append(str([getattr(text, name, None) for name in names]))
            stack += own["_modules"].values()
        structure.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return cls(tuple(structure), tuple(values))

    def difference(self, other: Fingerprint) -> str:
        """Return the first part in which the structure of another differs."""
        pairs = zip(self.structure, other.structure, strict=False)
        return next(
            (f"{a} → {b}" for a, b in pairs if a != b), f"{len(other.structure) - len(self.structure):+d} parts"
        )
