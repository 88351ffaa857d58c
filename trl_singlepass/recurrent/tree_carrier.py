"""How the tree reaches recurrent layers: as the padding mask that they receive anyway."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.context import Tree, current_tree


class RowMask(torch.Tensor):
    """
    Padding mask of shape `(1, row_length)` that carries the tree of the row.

    The recomputation of gradient checkpointing runs after the forward's context has ended, with the arguments that
    each layer had. Attention layers have their `TreeMask`; recurrent layers get the model's two-dimensional
    `attention_mask`, trimmed and moved, so the tree goes along with that tensor.

    It holds twos: transformers drops a mask that is all ones and takes zeros for padding, and the multiplicity of
    tokens, which is what the model got, must not multiply hidden states.
    """

    tree: Tree

    @classmethod
    def of(cls, tree: Tree) -> RowMask:
        """Return the mask of a row."""
        mask = torch.full_like(tree.subtree_end, 2).as_subclass(cls)
        mask.tree = tree
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func in _STILL_THE_MASK:
                result = result.as_subclass(cls)
                result.tree = args[0].tree
        return result


_STILL_THE_MASK = (
    torch.Tensor.__getitem__,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.detach,  # by reentrant checkpointing, where a model passes the mask by position
    torch.Tensor.to,
)


def carry_trees(model: nn.Module, layers: Iterable[nn.Module]) -> list[Any]:
    """
    Hand the tree of the row to the inner models that build the masks of some layers.

    Args:
        model (`transformers.PreTrainedModel`):
            Model with its head; its own `attention_mask` stays what it is (mixture-of-experts losses read it).
        layers (`Iterable[torch.nn.Module]`):
            Recurrent layers.

    Returns:
        `list`: Handles that remove the hooks.
    """
    wanted = set(layers)
    return [
        module.register_forward_pre_hook(_mask_carries_tree, with_kwargs=True)
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and wanted & set(module.modules())
    ]


def _mask_carries_tree(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tree = current_tree()
    if tree is None:
        return None
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    if "attention_mask" in names:
        index = names.index("attention_mask")
        return (*args[:index], RowMask.of(tree), *args[index + 1 :]), kwargs
    return args, {**kwargs, "attention_mask": RowMask.of(tree)}


def carried_tree(arguments: Iterable[Any]) -> Tree | None:
    """Return the tree that one of a layer's arguments carries, the current one if none does."""
    for value in arguments:
        tree = getattr(value, "tree", None)
        if isinstance(tree, Tree):
            return tree
        if isinstance(value, dict):
            inner = carried_tree(value.values())
            if inner is not None:
                return inner
    return current_tree()
