"""How the tree reaches recurrent layers: inside the padding mask that they receive anyway."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..attention.context import Tree, current_tree


class TreePaddingMask(torch.Tensor):
    """
    Padding mask of shape `(1, row_length)` that carries the tree of the row.

    Gradient checkpointing recomputes a layer after the forward's context has ended, with the arguments that the layer
    had. Attention layers have their `TreeMask`. Recurrent layers get the model's two-dimensional `attention_mask`,
    trimmed and moved, so the tree travels in that tensor.

    The mask is filled with twos: transformers drops a mask of ones and takes zeros for padding. The multiplicity of
    tokens, which the model got as its mask, would scale hidden states.
    """

    tree: Tree

    @classmethod
    def from_tree(cls, tree: Tree) -> TreePaddingMask:
        """Return the mask of a row, of this rank's part of it if ranks share it."""
        tokens = tree.subtree_end if tree.group is None else tree.group.part(tree.subtree_end)
        mask = torch.full_like(tokens, 2).as_subclass(cls)
        mask.tree = tree
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func in _KEEP_THE_TREE:
                result = result.as_subclass(cls)
                result.tree = args[0].tree
        return result


_KEEP_THE_TREE = (
    torch.Tensor.__getitem__,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.detach,  # by reentrant checkpointing, where a model passes the mask by position
    torch.Tensor.to,
)


def pass_tree_in_masks(model: PreTrainedModel, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
    """
    Pass the tree of the row to the inner models that build the masks of some layers.

    Returns handles that remove the hooks. The `attention_mask` of the model with its head stays as it is:
    mixture-of-experts losses read it.
    """
    wanted = set(layers)
    return [
        module.register_forward_pre_hook(_replace_mask, with_kwargs=True)
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and wanted & set(module.modules())
    ]


def _replace_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    tree = current_tree()
    if tree is None:
        return None
    mask = TreePaddingMask.from_tree(tree)
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    if "attention_mask" in names:
        index = names.index("attention_mask")
        return (*args[:index], mask, *args[index + 1 :]), kwargs
    return args, {**kwargs, "attention_mask": mask}


def find_tree(arguments: Iterable[object]) -> Tree | None:
    """Return the tree that one of a layer's arguments carries, or else the current one."""
    for value in arguments:
        tree = getattr(value, "tree", None)
        if isinstance(tree, Tree):
            return tree
        if isinstance(value, dict):
            inner = find_tree(value.values())
            if inner is not None:
                return inner
    return current_tree()
