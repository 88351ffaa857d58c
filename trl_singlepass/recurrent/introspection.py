"""How each layer of a model runs on a tree, by its code: which ones mix tokens outside attention, and how."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import FunctionType

from torch import nn
from transformers import PreTrainedModel

from .row_kernels import CONVOLUTION, SCANS, RowKernels
from .schedule import ReplayMode


# Layers that keep states outside the cache or update them in several methods, and attention that selects its tokens in
# its own way: they run over whole paths. Listed by class name in transformers.
WHOLE_PATH_LAYERS = frozenset({"RecurrentGemmaRecurrentBlock", "Qwen4ExpTextPLELayer"})
SELECTING_LAYERS = frozenset({"DogeAttention"})
# Submodules of attention that select tokens or pool them.
SELECTING_PARTS = ("indexer", "compressor")
# Parts of a model's configuration that describe its encoders of other media.
ENCODER_CONFIGS = ("vision_config", "audio_config")
# Argument that holds what an earlier layer selected.
SELECTION = "prev_topk_indices"
# Argument that holds the distance between each pair of tokens.
DISTANCE = "relative_distance"


def get_replay_mode(layer: nn.Module) -> ReplayMode | None:
    """
    Return how a layer runs on a tree, `None` if it is neither recurrent nor attention that needs a whole path.

    The calls that its `forward` makes to transformers' cache tell: one that passes the cached state to its kernel can
    start anywhere, one that caches only a convolution's inputs looks a few tokens back, others run over whole paths.
    """
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    if code is None:
        return None
    names = set(code.co_names)  # of methods it calls and globals it reads
    keywords = {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}
    if "ALL_ATTENTION_FUNCTIONS" in names and _needs_whole_path(layer, keywords):
        return ReplayMode(starts_from_state=False, attends=True)
    if type(layer).__name__ in WHOLE_PATH_LAYERS or "get_linear_cache" in names:
        return ReplayMode(starts_from_state=False)
    if "get_conv_state" not in names:
        return None
    if "get_recurrent_state" not in names:
        convolutions = (module for module in layer.modules() if isinstance(module, nn.Conv1d))
        reach = sum((module.kernel_size[0] - 1) * module.dilation[0] for module in convolutions)
        return ReplayMode(starts_from_state=False, reach=reach)
    return ReplayMode(starts_from_state=bool(keywords & {"initial_state", "initial_states"}))


def _needs_whole_path(layer: nn.Module, keywords: set[object]) -> bool:
    """Whether attention selects or pools tokens, or its scores depend on the tokens' index in the sequence."""
    if type(layer).__name__ in SELECTING_LAYERS or "position_bias" in keywords:
        return True
    selects = any(isinstance(getattr(layer, part, None), nn.Module) for part in SELECTING_PARTS)
    # A layer may reuse an earlier layer's selection, which holds indices within a path.
    return selects or SELECTION in inspect.signature(type(layer).forward).parameters


def find_row_kernels(layer: nn.Module, mode: ReplayMode) -> RowKernels | None:
    """
    Return the kernels of a layer that can run on a whole row and does not run on trees yet.

    `None` if it has to run piece by piece: with another kernel, or with a `forward` or convolution that a library has
    replaced or hooked (CPU offload, `kernelize`).
    """
    forward = inspect.unwrap(type(layer).forward)
    if not isinstance(forward, FunctionType) or mode.attends:
        return None
    hooked = "forward" in vars(layer) or any("_hf_hook" in vars(child) for child in layer.children())
    names = set(forward.__code__.co_names)
    scans = [name for name in SCANS if name in names]
    if hooked or CONVOLUTION not in names or len(scans) != mode.starts_from_state:
        return None
    if not scans and mode.reach is None:
        return None
    sizes = [module.kernel_size[0] for module in layer.modules() if isinstance(module, nn.Conv1d)]
    if not sizes:
        return None
    in_waves = replace(mode, reach=max(sizes) - 1, by_kernels=True)
    return RowKernels(forward, scans[0] if scans else None, in_waves)


def path_dependent_layers(model: PreTrainedModel) -> dict[nn.Module, ReplayMode]:
    """Return the outermost layers that a mask alone does not bring onto a tree, with how each runs on one."""
    layers: dict[nn.Module, ReplayMode] = {}
    inside: set[nn.Module] = set()
    for module in decoder_modules(model):
        mode = None if module in inside else get_replay_mode(module)
        if mode is not None:
            layers[module] = mode
            inside |= set(module.modules())
    return layers


def path_dependent_layer_names(model: PreTrainedModel) -> list[str]:
    """Return the class names of [`path_dependent_layers`], for messages."""
    return sorted({type(layer).__name__ for layer in path_dependent_layers(model)})


def get_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that reads tokens, without the encoders of other modalities."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # Some models call their head a decoder.
    if isinstance(decoder, nn.Module) and model.get_input_embeddings() in set(decoder.modules()):
        return decoder
    whole: nn.Module = model
    return whole


def decoder_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield the modules that read tokens: the decoder's, without encoders of other media that it holds (GIT)."""
    configs = {name: getattr(model.config, name, None) for name in model.config.sub_configs if name in ENCODER_CONFIGS}
    encoders = tuple(type(config) for config in configs.values() if config is not None)
    yield from dict.fromkeys(_without_encoders(get_decoder(model), encoders))  # layers may share a module


def _without_encoders(module: nn.Module, encoders: tuple[type, ...]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if not isinstance(getattr(child, "config", None), encoders):
            yield from _without_encoders(child, encoders)
