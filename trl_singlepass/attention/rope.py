"""
RoPE whose factors depend on the length of a sequence: on a tree, that of the sample and not of the row.

longrope takes other factors for a sequence with a position from `original_max_position_embeddings` on. Each token of a
row takes those of the samples that pass through it, in waves as well, where no position may be so large.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .context import current_tree
from .kv_cache import is_in_backward


def rope_types(module: nn.Module) -> set[str]:
    """Return the types of RoPE of a module, one for each type of layers that it serves."""
    found = getattr(module, "rope_type", None)
    return set(found.values()) if isinstance(found, dict) else {found} if isinstance(found, str) else set()


def switching_lengths(model: nn.Module) -> set[int]:
    """Return the numbers of tokens above which RoPE takes other factors."""
    return {length for module in model.modules() if "longrope" in rope_types(module) for length in _lengths(module)}


def follow_samples(model: nn.Module) -> list[Any]:
    """Make RoPE whose factors depend on the length of a row take that of samples; return handles of the hooks."""
    modules = [module for module in model.modules() if "longrope" in rope_types(module)]
    return [module.register_forward_hook(_by_sample, with_kwargs=True) for module in modules]


def _lengths(module: Any) -> Iterator[int]:
    given = module.config.get_text_config().rope_parameters
    for parameters in (given, *given.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            yield int(parameters["original_max_position_embeddings"])


def _by_sample(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    row = current_tree()
    if row is None:
        if is_in_backward() and getattr(module, "_ran_on_tree", False):
            raise RuntimeError(
                f"{type(module).__name__} is recomputed in backward, where the tree of its row is not known. Turn "
                "gradient checkpointing off for this model."
            )
        module._ran_on_tree = False
        return None
    module._ran_on_tree = True
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
    positions: Tensor = given.pop("position_ids")
    limits = sorted(set(_lengths(module)))
    lengths = row.part_of_rank(row.make_once("sample_lengths", lambda: row.sample_lengths(limits)))
    for limit in limits:
        is_long = (lengths > limit).to(positions.device, non_blocking=True).expand(positions.shape)
        last = positions.new_full((*positions.shape[:-1], 1), limit)
        # The last position decides, and its own angles are cut off.
        long = module.forward(position_ids=torch.cat([positions, last], dim=-1), **given)
        short = module.forward(position_ids=positions.masked_fill(is_long, 0), **given)
        output = tuple(
            torch.where(is_long[..., None], of_long[..., :-1, :], of_short)
            for of_long, of_short in zip(long, short, strict=True)
        )
    return output
