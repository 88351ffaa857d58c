"""
A recurrent layer on a tree.

Where only its convolution and scan mix tokens, it runs once over the row ([`row_kernels`]). Any other layer runs piece
by piece: its inputs are gathered, and its outputs put in the row's order. So does every layer of a wave that several
ranks share.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..attention.context import Tree, current_tree
from ..attention.kv_cache import is_in_backward
from ..attention.registry import KEEPS_ATTENTION
from ..attention.row_group import RowGroup
from ..attention.tree_mask import TreeMask
from .introspection import DISTANCE, SELECTION, find_row_kernels, path_dependent_layers
from .layout import Layout
from .scan_check import check_scan
from .schedule import Piece, ReplayMode
from .states import ForkStates, InputKey, RowBoundary, get_boundary, map_tensors


def enable_tree_recurrence(model: PreTrainedModel) -> None:
    """Wrap the `forward` of path-dependent layers, before the model's attention is switched to trees."""
    layers = {layer: mode for layer, mode in path_dependent_layers(model).items() if not runs_on_trees(layer)}
    for layer, mode in layers.items():
        _wrap(layer, mode)
    if layers:
        model._tree_handles = pass_tree_in_masks(model, layers)


def _wrap(layer: Any, mode: ReplayMode) -> None:
    if mode.attends:
        implementation = layer.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"{type(layer).__name__} selects the tokens that it attends to, which on a tree works with "
                f"attn_implementation='sdpa' or 'eager', not {implementation!r}. Load the model with one of these."
            )
        layer.config = copy.copy(layer.config)  # the layer keeps its attention when the model switches to another
        setattr(layer.config, KEEPS_ATTENTION, True)
    layer._replay_mode, layer._row_kernels = mode, find_row_kernels(layer, mode)
    layer._stock_forward = layer.forward
    layer._had_own_forward = "forward" in vars(layer)
    layer.forward = MethodType(_forward, layer)


def disable_tree_recurrence(model: PreTrainedModel) -> None:
    """Undo [`enable_tree_recurrence`]."""
    for layer in filter(runs_on_trees, model.modules()):
        if layer._had_own_forward:
            layer.forward = layer._stock_forward
        else:
            del layer.forward
        del layer._stock_forward, layer._replay_mode, layer._row_kernels, layer._had_own_forward
    for handle in vars(model).pop("_tree_handles", ()):
        handle.remove()


def runs_on_trees(layer: nn.Module) -> bool:
    """Whether a layer has been made to run on trees."""
    return "_replay_mode" in vars(layer)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace the `forward` of a layer."""
    tree = find_tree([*args, *kwargs.values()])
    if tree is None:
        if getattr(layer, "_ran_on_tree", False) and is_in_backward():
            raise RuntimeError(
                f"{type(layer).__name__} is recomputed in backward, but the tree of its forward was not passed to it. "
                "Turn gradient checkpointing off for this model."
            )
        layer._ran_on_tree = False
        return layer._stock_forward(*args, **kwargs)
    layer._ran_on_tree = True
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    hidden = next(x for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point())
    if layer._row_kernels is not None and layer._row_kernels.scan is not None:
        check_scan(layer, layer._row_kernels.scan, hidden)
    return _run(layer, arguments, tree.on(hidden.device))


def _run(layer: Any, arguments: Mapping[str, object], tree: Tree) -> Any:
    arguments = {name: False if name == "use_cache" else value for name, value in arguments.items()}
    if layer._row_kernels is not None and (tree.group is None or get_boundary(tree, layer._row_kernels.mode) is None):
        unused = {name for name, value in arguments.items() if _carries_tree(value)} | _cache_arguments(layer)
        return layer._row_kernels.run(layer, arguments | dict.fromkeys(unused), tree)
    layout = _get_layout(tree, layer._replay_mode)
    if tree.group is None:
        return _run_pieces(layer, arguments, layout)
    return _run_gathered(layer, arguments, layout, tree.group)


def _run_gathered(layer: Any, arguments: Mapping[str, object], layout: Layout, group: RowGroup) -> Any:
    """Run a layer that cannot be divided on a row that ranks share: each runs the row, and keeps its part of it."""
    num_tokens = layout.length // group.size

    def gather(x: Tensor, path: InputKey) -> Tensor:
        return group.gather(x) if x.shape[:2] == (1, num_tokens) else x

    def part(x: Tensor, path: InputKey) -> Tensor:
        return group.part(x) if x.shape[:2] == (1, layout.length) else x

    whole = {name: value if _carries_tree(value) else map_tensors(value, gather) for name, value in arguments.items()}
    return map_tensors(_run_pieces(layer, whole, layout), part)


def _run_pieces(layer: Any, arguments: Mapping[str, object], layout: Layout) -> Any:
    mode: ReplayMode = layer._replay_mode
    boundary, cache_arguments = layout.boundary, _cache_arguments(layer)
    if boundary is not None:
        boundary.begin(layer)
        arguments = {name: _extend(layer, name, value, boundary) for name, value in arguments.items()}
    per_batch = {name: _split(layer, name, value, layout) for name, value in arguments.items()}
    outputs: list[Any] = []
    states: dict[int, ForkStates] = {}
    for step, batch in enumerate(layout.schedule.batches):
        inputs = {name: values[step] for name, values in per_batch.items()}
        pieces = [layout.schedule.pieces[index] for index in batch]
        cache = ForkStates([_source(layer, piece, states, layout) for piece in pieces if piece.starts_from_state])
        inputs |= dict.fromkeys(cache_arguments, cache if mode.starts_from_state else None)
        outputs.append(layer._stock_forward(**inputs))
        if mode.starts_from_state and not cache.final:
            raise RuntimeError(
                f"{type(layer).__name__} put no state in the cache that it was given, so its branches would be "
                "trained without their history. Use a version of transformers that README.md lists as known to work."
            )
        if pieces[0].is_source:
            states[batch[0]] = cache
    output = layout.scatter(outputs)
    if boundary is None:
        return output
    states_by_end = {layout.schedule.pieces[index].ranges[-1][1]: cache for index, cache in states.items()}
    return boundary.store_states(layer, output, states_by_end)


def _extend(layer: nn.Module, name: str, value: Any, boundary: RowBoundary) -> object:
    """Append to one argument what is stored of it, except for masks, which are built anew for each batch of pieces."""
    if _carries_tree(value):
        return value
    if name == SELECTION and value is not None:
        # One entry per query. Replayed history needs some, but nobody reads what it attends to.
        return torch.cat([value, value[:, :1].expand(-1, boundary.num_outside, *value.shape[2:])], dim=1)
    return boundary.extend(layer, name, value)


def _source(layer: nn.Module, piece: Piece, states: Mapping[int, ForkStates], layout: Layout) -> ForkStates:
    """Return the states that a piece starts from."""
    if piece.source >= 0:
        return states[piece.source]
    assert layout.boundary is not None, "only a wave continues tokens outside its row"
    return layout.boundary.load_states(layer, piece.source_token - layout.length, layout.device)


def _split(layer: Any, name: str, value: Any, layout: Layout) -> list[Any]:
    """Return the values of one argument for each batch of pieces."""
    if name == DISTANCE and value is not None:
        return layout.distances()
    if not _carries_tree(value):
        return layout.gather(value)
    if not layer._replay_mode.attends:
        return [None] * len(layout.shapes)  # padding comes last, so there is nothing to mask
    if isinstance(value, TreeMask):
        is_eager = layer.config._attn_implementation == "eager"
        return layout.masks(value, next(layer.parameters()).dtype if is_eager else None)
    return [torch.ones(shape, dtype=torch.bool, device=value.device) for shape in layout.shapes]


def _carries_tree(value: object) -> bool:
    return isinstance(getattr(value, "tree", None), Tree)


def _get_layout(tree: Tree, mode: ReplayMode) -> Layout:
    """Return the layout of a row, shared by all layers that run the same way."""

    def make() -> Layout:
        boundary = get_boundary(tree, mode)
        schedule = mode.schedule(tree.plan, () if boundary is None else boundary.state_ends)
        return Layout(tree.plan.length, schedule, tree.depth.device, boundary)

    return tree.make_once(mode, make)


def _cache_arguments(layer: nn.Module) -> set[str]:
    """Return the names under which a layer takes its cache: `cache` since transformers 5.24, the others before."""
    return {"cache", "cache_params", "past_key_values"} & set(inspect.signature(type(layer).forward).parameters)


# How the tree reaches a layer: inside the padding mask that it gets anyway -------------------------------------------


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
    Pass the tree of the row to the inner models that build the masks of some layers; return handles of the hooks.

    The `attention_mask` of the model with its head stays as it is: mixture-of-experts losses read it.
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
