"""Which layers mix tokens by a recurrence or a convolution, and how each kind runs on a tree."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..trees.rows import TreePlan
from .schedule import SHORTEST_IN_BATCH, Schedule, fork_schedule, path_schedule


# A mask reaches none of these: they mix neighbouring tokens of the row, siblings included.
MIXING_MODULES = (nn.Conv1d, nn.RNNBase)

# Layers whose states are kept outside the cache, or in several methods, and attention that selects its tokens in a way
# of its own: they run over whole paths. A class is listed by its name in transformers.
WHOLE_PATH_LAYERS = frozenset({"RecurrentGemmaRecurrentBlock", "Qwen4ExpTextPLELayer"})
SELECTING_LAYERS = frozenset({"DogeAttention"})
# Parts of attention that choose tokens or pool them.
SELECTING_PARTS = ("indexer", "compressor")
# Argument that holds what an earlier layer selected.
SELECTION = "prev_topk_indices"
# Argument that holds how far apart two tokens of the sequence are, for each pair.
DISTANCE = "relative_distance"


@dataclass(frozen=True, slots=True)
class ReplayMode:
    """
    How a layer runs on a tree.

    Args:
        starts_from_state (`bool`):
            Whether branches start from the state at their fork; otherwise they run together with their history.
        reach (`int`, *optional*):
            How many tokens back an output depends on; all of them if not given.
        attends (`bool`, *optional*, defaults to `False`):
            Whether the layer is attention, which needs its own causal mask over a path.
    """

    starts_from_state: bool
    reach: int | None = None
    attends: bool = False

    def schedule(self, plan: TreePlan, handed_on: Collection[int] = ()) -> Schedule:
        """
        Return the pieces in which the layer runs over a row.

        Args:
            plan (`TreePlan`):
                Structure of the row.
            handed_on (`Collection[int]`, *optional*):
                Positions just past the tokens whose states later rows start from.
        """
        if self.starts_from_state:
            return fork_schedule(plan, handed_on)
        # How many tokens attention selects depends on the length of the batch, which therefore has to be one.
        return path_schedule(plan, self.reach, shortest_in_batch=0.0 if self.attends else SHORTEST_IN_BATCH)


def get_replay_mode(layer: nn.Module) -> ReplayMode | None:
    """
    Return how a layer runs on a tree, `None` if it is neither recurrent nor attention that needs a whole path.

    What a recurrent layer is follows from the calls that its `forward` makes to transformers' cache: one that hands
    the cached state to its kernel as an initial state can start anywhere; one that caches nothing but inputs of a
    convolution looks a few tokens back; any other can only run over a whole path.

    Args:
        layer (`torch.nn.Module`):
            Layer of a model.
    """
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    if code is None:
        return None
    calls = set(code.co_names)  # and the globals that it reads
    keywords = {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}
    if "ALL_ATTENTION_FUNCTIONS" in calls and _needs_whole_path(layer, keywords):
        return ReplayMode(starts_from_state=False, attends=True)
    if type(layer).__name__ in WHOLE_PATH_LAYERS or "get_linear_cache" in calls:
        return ReplayMode(starts_from_state=False)
    if "get_conv_state" not in calls:
        return None
    if "get_recurrent_state" not in calls:
        return ReplayMode(starts_from_state=False, reach=_reach(layer))
    return ReplayMode(starts_from_state=bool(keywords & {"initial_state", "initial_states"}))


def _needs_whole_path(layer: nn.Module, keywords: set[Any]) -> bool:
    """Whether a layer is attention that selects or pools tokens, or adds to its scores what depends on their index."""
    if type(layer).__name__ in SELECTING_LAYERS or "position_bias" in keywords:
        return True
    selects = any(isinstance(getattr(layer, part, None), nn.Module) for part in SELECTING_PARTS)
    # A layer may take over the selection of an earlier one, as indices within a path.
    return selects or SELECTION in inspect.signature(type(layer).forward).parameters


def _reach(layer: nn.Module) -> int:
    convolutions = [module for module in layer.modules() if isinstance(module, nn.Conv1d)]
    return sum((module.kernel_size[0] - 1) * module.dilation[0] for module in convolutions)


def path_dependent_layers(model: Any) -> dict[nn.Module, ReplayMode]:
    """
    Return the layers of a model that mix tokens outside attention, or select the tokens that they attend to.

    Args:
        model (`transformers.PreTrainedModel`):
            Model.

    Returns:
        `dict[torch.nn.Module, ReplayMode]`: The outermost such layers, with how each runs on a tree.
    """
    return {layer: mode for layer, mode in _outermost(get_decoder(model)) if mode is not None}


def path_dependent_layer_names(model: Any) -> list[str]:
    """Return the classes of [`path_dependent_layers`], for messages."""
    return sorted({type(layer).__name__ for layer in path_dependent_layers(model)})


def unknown_mixing_layers(model: Any) -> set[str]:
    """Return the classes of layers that convolve or recur over tokens in a way that is not known."""
    return {
        type(layer).__name__
        for layer, mode in _outermost(get_decoder(model))
        if mode is None and any(isinstance(child, MIXING_MODULES) for child in layer.children())
    }


def get_decoder(model: Any) -> nn.Module:
    """Return the part of a model that reads tokens, without the encoders of other media."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # Some models call their head a decoder.
    if isinstance(decoder, nn.Module) and model.get_input_embeddings() in set(decoder.modules()):
        return decoder
    whole: nn.Module = model
    return whole


def _outermost(module: nn.Module) -> Iterator[tuple[nn.Module, ReplayMode | None]]:
    """Yield a module and what it holds, down to layers that run on trees as a whole."""
    mode = get_replay_mode(module)
    yield module, mode
    if mode is None:
        for child in module.children():
            yield from _outermost(child)
