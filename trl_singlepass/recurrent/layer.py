"""A recurrent layer on a tree: its inputs are gathered piece by piece, run, and put back in the row's order."""

from __future__ import annotations

import copy
import inspect
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..attention.context import Tree
from ..attention.tree_mask import TreeMask
from .boundary import Handover, HandsOver
from .fork_cache import ForkStates
from .layer_kinds import DISTANCE, SELECTION, ReplayMode, path_dependent_layers
from .layout import Layout
from .schedule import Piece
from .tree_carrier import carried_tree, carry_trees


def enable_tree_recurrence(model: Any) -> None:
    """
    Make the recurrent layers of a model run on trees; batches without a tree run as before.

    Each layer's `forward` is wrapped on the instance; [`disable_tree_recurrence`] takes that back.

    Args:
        model (`transformers.PreTrainedModel`):
            Model, changed in place. Its attention must not have been switched to tree attention yet.
    """
    layers = {layer: mode for layer, mode in path_dependent_layers(model).items() if not runs_on_trees(layer)}
    for layer, mode in layers.items():
        _wrap(layer, mode)
    if layers:
        model._tree_handles = carry_trees(model, layers)


def _wrap(layer: Any, mode: ReplayMode) -> None:
    if mode.attends:
        layer.config = _with_stock_attention(layer)
    layer._replay_mode = mode
    layer._stock_forward = layer.forward
    layer._had_own_forward = "forward" in vars(layer)
    layer.forward = MethodType(_forward, layer)


def _with_stock_attention(layer: Any) -> Any:
    """Return a config for one layer, which keeps the attention that its selection of tokens is written for."""
    implementation = layer.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"{type(layer).__name__} selects the tokens that it attends to, which on a tree works with "
            f"attn_implementation='sdpa' or 'eager', not {implementation!r}. Load the model with one of these."
        )
    return copy.copy(layer.config)


def disable_tree_recurrence(model: Any) -> None:
    """
    Take back what [`enable_tree_recurrence`] did.

    Args:
        model (`transformers.PreTrainedModel`):
            Model, changed in place.
    """
    for layer in filter(runs_on_trees, model.modules()):
        if layer._had_own_forward:
            layer.forward = layer._stock_forward
        else:
            del layer.forward
        del layer._stock_forward, layer._replay_mode, layer._had_own_forward
    for handle in vars(model).pop("_tree_handles", ()):
        handle.remove()


def runs_on_trees(layer: nn.Module) -> bool:
    """Whether a layer runs on trees."""
    return "_replay_mode" in vars(layer)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for the `forward` of a layer."""
    tree = carried_tree([*args, *kwargs.values()])
    if tree is None:
        _check_not_lost(layer)
        return layer._stock_forward(*args, **kwargs)
    layer._ran_on_tree = True
    tree.attended_by.add(layer)
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    return _run(layer, dict(zip(names, args, strict=False)) | kwargs, tree)


def _check_not_lost(layer: Any) -> None:
    """Refuse to recompute a layer without the tree that its forward had."""
    if getattr(layer, "_ran_on_tree", False) and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{type(layer).__name__} is recomputed in backward, but the tree of its forward was not handed to it. "
            "Turn gradient checkpointing off for this model."
        )
    layer._ran_on_tree = False


def _run(layer: Any, arguments: dict[str, Any], tree: Tree) -> Any:
    mode: ReplayMode = layer._replay_mode
    layout = _layout(tree, mode)
    handover = layout.handover
    arguments = {name: False if name == "use_cache" else value for name, value in arguments.items()}
    if handover is not None:
        arguments = {name: _extended(layer, name, value, handover) for name, value in arguments.items()}
    steps = {name: _per_step(layer, name, value, layout) for name, value in arguments.items()}
    cache_arguments = _cache_arguments(layer)
    outputs: list[Any] = []
    states: dict[int, ForkStates] = {}
    for step, batch in enumerate(layout.schedule.batches):
        inputs = {name: values[step] for name, values in steps.items()}
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
    if handover is None:
        return output
    ends = {layout.schedule.pieces[index].ranges[-1][1]: cache for index, cache in states.items()}
    return handover.hand_on(layer, output, ends)


def _extended(layer: Any, name: str, value: Any, handover: Handover) -> Any:
    """One argument with what is kept of it, but for masks: they are made anew for each batch of pieces."""
    if isinstance(getattr(value, "tree", None), Tree):
        return value
    if name == SELECTION and value is not None:  # of queries, and history that runs again queries in vain
        return torch.cat([value, value[:, :1].expand(-1, len(handover.kept.inputs), *value.shape[2:])], dim=1)
    return handover.extended(layer, value, (name,))


def _source(layer: Any, piece: Piece, states: dict[int, ForkStates], layout: Layout) -> ForkStates:
    """States that a piece starts from."""
    if piece.source >= 0:
        return states[piece.source]
    assert layout.handover is not None, "only a wave continues tokens outside its row"
    return layout.handover.recall(layer, piece.recalled - layout.length, layout.device)


def _per_step(layer: Any, name: str, value: Any, layout: Layout) -> list[Any]:
    """Values of one argument for each batch of pieces."""
    if name == DISTANCE and value is not None:
        return layout.distances()
    if not isinstance(getattr(value, "tree", None), Tree):
        return layout.gather(value)
    if not layer._replay_mode.attends:
        return [None] * len(layout.shapes)  # no padding comes before a token, so there is nothing to mask
    if isinstance(value, TreeMask):
        is_eager = layer.config._attn_implementation == "eager"
        return layout.masks(value, next(layer.parameters()).dtype if is_eager else None)
    return [torch.ones(shape, dtype=torch.bool, device=value.device) for shape in layout.shapes]


def _layout(tree: Tree, mode: ReplayMode) -> Layout:
    """Layout of a row, made once and shared by all layers that run the same way."""
    layouts = _layouts.setdefault(tree, {})
    if mode not in layouts:
        handover = tree.handover(mode) if isinstance(tree, HandsOver) else None
        schedule = mode.schedule(tree.plan, () if handover is None else handover.state_ends)
        # Not the tree itself, which would never be freed as a value of its own key.
        layouts[mode] = Layout(tree.plan.length, schedule, tree.depth.device, handover)
    return layouts[mode]


_layouts: WeakKeyDictionary[Tree, dict[ReplayMode, Layout]] = WeakKeyDictionary()


def _cache_arguments(layer: nn.Module) -> set[str]:
    """Names under which a layer takes its cache; transformers 5.24 calls it `cache`, earlier ones by the others."""
    return {"cache", "cache_params", "past_key_values"} & set(inspect.signature(type(layer).forward).parameters)
