"""What a model was when it was measured, in terms that are read once per step: by identity, without its tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checked_model import unwrapped


_OF_CONFIG = ("_attn_implementation", "_experts_implementation", "rope_parameters")
_PLAIN = {bool, int, float, str}
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
        """Read a model, about 3 µs per module."""
        structure: list[Any] = []
        values: list[Hashable] = []
        read: set[int] = set()  # configurations, which layers share
        stack: list[Any] = [unwrapped(model)]
        while stack:
            module = stack.pop()
            own, kind = module.__dict__, module.__class__
            structure += (
                kind,
                kind.forward,
                own.get("forward"),
                len(own["_forward_pre_hooks"]),
                len(own["_forward_hooks"]),
                len(own["_backward_pre_hooks"]),
                len(own["_backward_hooks"]),
            )
            for x in own["_parameters"].values():
                if x is not None:
                    structure += (x.requires_grad, x.dtype)
            values += [x for name, x in own.items() if x.__class__ in _PLAIN and name not in _MODES]
            if "_active_adapter" in own:
                structure.append(str((own["_active_adapter"], own.get("merged_adapters"))))
            config = own.get("config")
            if config is not None and id(config) not in read:
                read.add(id(config))
                text = config.get_text_config() if hasattr(config, "get_text_config") else config
                found = [getattr(text, name, None) for name in _OF_CONFIG]
                structure.append(str(found))
            stack += [child for child in own["_modules"].values() if child is not None]
        structure.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return cls(tuple(structure), tuple(values))

    def difference(self, other: Fingerprint) -> str:
        """Return the first part in which the structure of another differs."""
        pairs = zip(self.structure, other.structure, strict=False)
        return next(
            (f"{a} → {b}" for a, b in pairs if a != b), f"{len(other.structure) - len(self.structure):+d} parts"
        )
