"""
A layer that mixes tokens outside attention, on a tree.

Where only its convolution and scan mix tokens, it runs once over the row ([`row_kernels`]). Any other layer runs piece
by piece: its inputs are gathered, and its outputs put in the row's order. So does every layer of a wave that several
ranks share. How each layer runs is measured ([`measurement`]).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
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
from .layout import Layout
from .row_kernels import RowKernels
from .schedule import Piece, ReplayMode
from .states import ForkStates, InputKey, RowBoundary, get_boundary, map_tensors


@dataclass(frozen=True, slots=True, eq=False)
class TreeReplay:
    """How one layer runs on a tree, as it was measured."""

    mode: ReplayMode
    kernels: RowKernels | None = None  # with which it runs on a whole row, if it can
    cache_names: tuple[str, ...] = ()  # arguments in which it takes a cache
    empty_cache: Any = None  # of the class that the model makes
    distances: tuple[str, ...] = ()  # arguments that hold how far each pair of tokens is apart
    attention: str | None = None  # implementation of its attention, which it keeps over whole paths


def wrap(layer: Any, replay: TreeReplay) -> None:
    """Make a layer run on trees as its replay says."""
    if replay.mode.attends and hasattr(layer, "config"):
        layer._config_of_model = layer.config
        layer.config = copy.copy(layer.config)  # the layer keeps its attention when the model switches to another
        setattr(layer.config, KEEPS_ATTENTION, True)
        layer.config._attn_implementation = replay.attention
    layer._replay = replay
    _keep_wrapped(layer)


def _keep_wrapped(layer: Any) -> None:
    """Replace the `forward` of a layer, unless it is replaced: `kernelize` puts others in place, in `eval()` too."""
    own = vars(layer).get("forward")
    if getattr(own, "__func__", None) is not _forward:
        layer._stock_forward, layer._had_own_forward = layer.forward, own is not None
        layer.forward = MethodType(_forward, layer)


def unwrap(layer: Any) -> None:
    """Undo [`wrap`]."""
    if layer._had_own_forward:
        layer.forward = layer._stock_forward
    else:
        del layer.forward
    if "_config_of_model" in vars(layer):
        layer.config = vars(layer).pop("_config_of_model")
    del layer._stock_forward, layer._replay, layer._had_own_forward
    vars(layer).pop("_ran_on_tree", None)


def runs_on_trees(layer: nn.Module) -> bool:
    """Whether a layer has been made to run on trees."""
    return "_replay" in vars(layer)


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
    tree.seen.add(layer)
    arguments = by_name(layer, args, kwargs)
    return run_on_tree(layer, arguments, tree.on(first_tokens(arguments).device), layer._replay)


def by_name(layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Any]:
    """Return the arguments of a layer by their names."""
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def first_tokens(arguments: Mapping[str, object]) -> Tensor:
    """Return the hidden states that a layer gets: its first argument of floating point."""
    return next(x for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point())


def run_on_tree(layer: Any, arguments: Mapping[str, object], tree: Tree, replay: TreeReplay) -> Any:
    """Run a layer on a row: by its kernels, or piece by piece."""
    kernels = replay.kernels
    if kernels is not None and (tree.group is None or get_boundary(tree, kernels.mode) is None):
        unused = {name for name, value in arguments.items() if carries_tree(value)} | set(replay.cache_names)
        return kernels.run(layer, {**arguments, **dict.fromkeys(unused)}, tree)
    layout = _get_layout(tree, replay)
    if tree.group is None:
        return _run_pieces(layer, arguments, layout, replay)
    return _run_gathered(layer, arguments, layout, tree.group, replay)


def _run_gathered(
    layer: Any, arguments: Mapping[str, object], layout: Layout, group: RowGroup, replay: TreeReplay
) -> Any:
    """Run a layer that cannot be divided on a row that ranks share: each runs the row, and keeps its part of it."""
    num_tokens = layout.length // group.size

    def gather(x: Tensor, path: InputKey) -> Tensor:
        return group.gather(x) if x.shape[:2] == (1, num_tokens) else x

    def part(x: Tensor, path: InputKey) -> Tensor:
        return group.part(x) if x.shape[:2] == (1, layout.length) else x

    whole = {name: value if carries_tree(value) else map_tensors(value, gather) for name, value in arguments.items()}
    return map_tensors(_run_pieces(layer, whole, layout, replay), part)


def _run_pieces(layer: Any, arguments: Mapping[str, object], layout: Layout, replay: TreeReplay) -> Any:
    from_state, boundary = replay.mode.starts_from_state, layout.boundary
    forward = vars(layer).get("_stock_forward", layer)  # one that is measured runs as it is
    if boundary is not None:
        boundary.begin(layer)
        arguments = {name: _extend(layer, name, value, boundary) for name, value in arguments.items()}
    per_batch = {name: _split(layer, name, value, layout, replay) for name, value in arguments.items()}
    outputs: list[Any] = []
    states: dict[int, ForkStates] = {}
    for step, batch in enumerate(layout.schedule.batches):
        inputs = {name: values[step] for name, values in per_batch.items()} | dict.fromkeys(replay.cache_names)
        pieces = [layout.schedule.pieces[index] for index in batch]
        if from_state:
            sources = [_source(layer, piece, states, layout) for piece in pieces if piece.starts_from_state]
            own = ForkStates(replay.empty_cache, sources)
            inputs |= dict.fromkeys(replay.cache_names, own.cache)
        outputs.append(forward(**inputs))
        if from_state and not own.tensors():
            raise RuntimeError(
                f"{type(layer).__name__} put no state in the cache that it was given, so its branches would be "
                "trained without their history. Call enable_tree again after a change of the model."
            )
        if from_state and pieces[0].is_source:
            states[batch[0]] = own
    output = layout.scatter(outputs)
    if boundary is None:
        return output
    by_end = {layout.schedule.pieces[index].ranges[-1][1]: own for index, own in states.items()}
    boundary.tensors[layer].example = next(iter(by_end.values()), boundary.tensors[layer].example)
    return boundary.store_states(layer, output, {end: own.tensors() for end, own in by_end.items()})


def _extend(layer: nn.Module, name: str, value: Any, boundary: RowBoundary) -> object:
    """Append to one argument what is stored of it, except for masks, which are built anew for each batch of pieces."""
    if carries_tree(value):
        return value
    if isinstance(value, Tensor) and value.dim() > 2 and not value.is_floating_point():
        # What each query selects on its path. Replayed history needs some, but nobody reads what it attends to.
        return torch.cat([value, value[:, :1].expand(-1, boundary.num_outside, *value.shape[2:])], dim=1)
    return boundary.extend(layer, name, value)


def _source(layer: nn.Module, piece: Piece, states: Mapping[int, ForkStates], layout: Layout) -> ForkStates:
    """Return the states that a piece starts from."""
    if piece.source >= 0:
        return states[piece.source]
    boundary = layout.boundary
    assert boundary is not None, "only a wave continues tokens outside its row"
    example = boundary.tensors[layer].example
    assert example is not None, "a state is stored before a row starts from it"
    return example.with_tensors(boundary.load_states(layer, piece.source_token - layout.length, layout.device))


def _split(layer: Any, name: str, value: Any, layout: Layout, replay: TreeReplay) -> list[Any]:
    """Return the values of one argument for each batch of pieces."""
    if name in replay.distances and value is not None:
        return layout.distances()
    if not carries_tree(value):
        return layout.gather(value)
    if not replay.mode.attends:
        return [None] * len(layout.shapes)  # padding comes last, so there is nothing to mask
    if isinstance(value, TreeMask):
        is_eager = replay.attention == "eager"
        return layout.masks(value, next(layer.parameters()).dtype if is_eager else None)
    return [torch.ones(shape, dtype=torch.bool, device=value.device) for shape in layout.shapes]


def carries_tree(value: object) -> bool:
    """Whether an argument of a layer is one of the masks that carry the tree."""
    return isinstance(getattr(value, "tree", None), Tree)


def _get_layout(tree: Tree, replay: TreeReplay) -> Layout:
    """Return the layout of a row, shared by all layers that run the same way."""

    def make() -> Layout:
        boundary = get_boundary(tree, replay.mode)
        schedule = replay.mode.schedule(tree.plan, () if boundary is None else boundary.state_ends)
        return Layout(tree.plan.length, schedule, tree.depth.device, boundary)

    return tree.make_once(replay.mode, make)


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
    prepare = partial(_replace_mask, tuple(layer for layer in wanted if runs_on_trees(layer)))
    return [
        module.register_forward_pre_hook(prepare, with_kwargs=True)
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and wanted & set(module.modules())
    ]


def _replace_mask(
    layers: Iterable[nn.Module], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    tree = current_tree()
    if tree is None:
        return None
    for layer in layers:
        _keep_wrapped(layer)
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
