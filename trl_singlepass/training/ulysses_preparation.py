"""Keeps accelerate and DeepSpeed, as they take over a model, from stopping at what only their own exchange needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import accelerate.accelerator


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@contextmanager
def allowing_global_sizes(config: PreTrainedConfig) -> Iterator[None]:
    """
    Let DeepSpeed read one head size from a configuration whose layers have several, as Gemma 4's does.

    Only DeepSpeed's own exchange uses that size, and rows on trees do not go through it.
    """
    if not getattr(config, "is_heterogeneous", False):
        yield
        return
    before, config.allow_global_per_layer_attribute_access = config.allow_global_per_layer_attribute_access, True
    try:
        yield
    finally:
        config.allow_global_per_layer_attribute_access = before


@contextmanager
def allowing_recurrent_layers() -> Iterator[None]:
    """
    Keep accelerate from refusing models with recurrent layers, as it does from 1.15 on.

    In the code that it knows, such a layer would start anew on each rank. Here, the layer gets the whole row
    (`recurrent/shared_rows.py`).
    """
    name = "_refuse_recurrent_layers_under_sequence_parallelism"
    refuse = getattr(accelerate.accelerator, name, None)
    if refuse is None:
        yield
        return
    setattr(accelerate.accelerator, name, lambda model: None)
    try:
        yield
    finally:
        setattr(accelerate.accelerator, name, refuse)
