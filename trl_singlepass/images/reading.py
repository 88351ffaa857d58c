"""
How a model reads images on a tree: each distinct one computed once, shown wherever a token of the row stands for it.

A model of transformers computes the features of its images in `get_image_features` and scatters them over the
placeholder tokens of the batch, in their order. On a tree, an image can stand in several places, or in one place for
many samples. So that method runs on the distinct images of the row, and returns one feature per placeholder.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..trees.image_features import shown_numbers
from ..trees.rows import Ranges, TreePlan, overlaps


_GRID = "image_grid_thw"
# What `get_rope_index` may ask for besides; videos and sound are not given.
_KNOWN = frozenset(
    {
        "input_ids", "mm_token_type_ids", _GRID, "attention_mask", "video_grid_thw", "second_per_grid_ts",
        "second_per_grids", "audio_seqlens", "use_audio_in_video", "kwargs",
    }
)  # fmt: skip
# What models scatter over their tokens; some project the hidden states of their tower afterwards (Llama 4).
_FEATURES = ("pooler_output", "last_hidden_state")
# Features for several layers of the language model (Qwen3-VL), each like the ones above.
_LAYERED_FEATURES = "deepstack_features"
# What models call the kind of each token: 0 for text, 1 for a part of an image.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
# By what a model lets the tokens of an image see each other.
_BLOCKS = frozenset({"block_sequence_ids", "get_block_sequence_ids_for_mask"})
_WAY_OUT = "Train it on one sample per turn (N-pass) with TRL's SFTTrainer, or on text alone."


class EncodedImages:
    """
    What the encoder computes of the images of a row, which wait for its pieces as keys and values do.

    The encoder runs in the first call. The gradients of pieces add up, in float32 at least, until the piece whose
    backward comes last takes them, together with its own, through the encoder.
    """

    def __init__(self, *, trains: bool = False) -> None:
        self.trains = trains  # whether a backward follows
        self.is_last = False  # whether the backward of the piece that runs comes last, of those of the row
        self._outputs: Any = None
        self._waiting: dict[int, Tensor] = {}

    def outputs(self, encode: Callable[[], Any]) -> Any:
        """Return what the encoder computes."""
        if self._outputs is None:
            with torch.set_grad_enabled(self.trains):
                self._outputs = encode()
        return copy.copy(self._outputs) if isinstance(self._outputs, ModelOutput) else self._outputs

    def for_piece(self, features: Tensor) -> Tensor:
        """Return features for the piece that runs: a copy whose gradients wait, or for the last piece, their taker."""
        if not features.requires_grad:
            return features
        if id(features) not in self._waiting:
            wide = features.detach().to(torch.promote_types(features.dtype, torch.float32))
            self._waiting[id(features)] = wide.requires_grad_()
        waiting = self._waiting[id(features)]
        if not (self.is_last and torch.is_grad_enabled()):
            return waiting.to(features.dtype)

        def with_others(own: Tensor) -> Tensor:
            others, waiting.grad = waiting.grad, None
            return own if others is None else (own + others).to(own.dtype)

        with_hook: Any = features.view_as(features)
        with_hook.register_hook(with_others)
        taker: Tensor = with_hook
        return taker


@dataclass(frozen=True, slots=True, eq=False)
class ShownFeatures:
    """Which feature each placeholder of a row, or of some of its tokens, shows."""

    # (num_placeholders,), int64: features, counted over the row's distinct images, in placeholder order
    index: Tensor
    sizes: tuple[int, ...]  # number of features of each distinct image; empty if the row shows no image
    encoded: EncodedImages | None = None  # of a row that runs in pieces

    @classmethod
    def in_row(
        cls,
        image_features: Tensor,
        plan: TreePlan,
        tokens: Ranges | None = None,
        encoded: EncodedImages | None = None,
    ) -> ShownFeatures:
        """Return the features that the tokens of a row, `(1, row_length)`, show, without waiting for the device."""
        images = plan.images if tokens is None else overlaps(plan.images, tokens)
        parts = [image_features[0, start:end] for start, end in images]
        return cls(torch.cat(parts) if parts else image_features[0, :0], plan.image_sizes, encoded)


_shown: ContextVar[ShownFeatures | None] = ContextVar("trl_singlepass_shown_features", default=None)


@contextmanager
def showing_images(
    image_features: Tensor | None, plan: TreePlan, tokens: Ranges | None = None, encoded: EncodedImages | None = None
) -> Iterator[None]:
    """Run the model calls inside on the images of a row, if it has some; calls on parts of it share the `encoded`."""
    shown = None if image_features is None else ShownFeatures.in_row(image_features, plan, tokens, encoded)
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def image_module(model: nn.Module) -> nn.Module | None:
    """Return the part of a model whose `get_image_features` computes them, the innermost, if there is any."""
    found = [module for module in model.modules() if hasattr(type(module), "get_image_features")]
    return found[-1] if found else None


def images_see_themselves(model: nn.Module) -> bool:
    """Return whether a model lets the tokens of an image see each other in both directions (Gemma 3)."""
    module = image_module(model)
    return module is not None and not _BLOCKS.isdisjoint(_names(type(module).forward))


def _one_feature_per_placeholder(module: nn.Module, encode: Callable[[], Any]) -> Any:
    shown = _shown.get()
    if shown is None:
        return encode()
    outputs = encode() if shown.encoded is None else shown.encoded.outputs(encode)
    if not isinstance(outputs, ModelOutput):  # transformers before 5.14
        return _gathered(outputs, shown, module)
    for name in _FEATURES:
        features = outputs.get(name)
        if features is not None and (name == _FEATURES[0] or _num_features(features) == sum(shown.sizes)):
            outputs[name] = _gathered(features, shown, module)
    layered = outputs.get(_LAYERED_FEATURES)
    if layered is not None:
        outputs[_LAYERED_FEATURES] = type(layered)(
            # Some models store features beside the number of their layer.
            (layer[0], _gathered(layer[1], shown, module))
            if isinstance(layer, tuple) and isinstance(layer[0], int)
            else _gathered(layer, shown, module)
            for layer in layered
        )
    return outputs


def _gathered(features: Tensor | Sequence[Tensor], shown: ShownFeatures, module: nn.Module) -> Any:
    """Features by placeholder, in the form that they had by image: a tensor, or a sequence of them."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    counts = [part.numel() // part.shape[-1] for part in parts]
    by_image = len(counts) == len(shown.sizes) and len(counts) > 1
    if shown.sizes and (sum(counts) != sum(shown.sizes) or (by_image and tuple(counts) != shown.sizes)):
        raise ValueError(
            f"{type(module).__name__} computes {counts} features of the images of a row, and its tokens stand for "
            f"{list(shown.sizes)}. Load the processor that belongs to the model."
        )
    if shown.encoded is not None:
        parts = [shown.encoded.for_piece(part) for part in parts]
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    by_placeholder = flat.index_select(0, shown.index.to(flat.device))
    by_placeholder = by_placeholder.view(*[1] * (parts[0].dim() - 2), *by_placeholder.shape)
    return by_placeholder if isinstance(features, Tensor) else (by_placeholder,)


def _num_features(features: Any) -> int:
    return features.numel() // features.shape[-1] if isinstance(features, Tensor) else -1


@dataclass(frozen=True, slots=True, eq=False)
class ImageReader:
    """How a model reads rows with images."""

    token_types: tuple[str, ...]  # names under which its forward takes the kind of each token
    positions: PathPositions | None  # of its tokens, if they have several dimensions

    @classmethod
    def enable(cls, model: nn.Module) -> ImageReader:
        """Make a model, without adapters, show images on trees, or refuse it (see [`check_reads_images`])."""
        module: Any = check_reads_images(model)
        positions = PathPositions.from_model(model)
        function: Any = type(module).get_image_features

        @functools.wraps(function)  # `generate` reads the signature
        def get_image_features(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _one_feature_per_placeholder(module, functools.partial(function, module, *args, **kwargs))

        # Compiled models leave this function, which reads a context variable, and compile the encoder that it calls.
        showing: Any = torch.compiler.disable(get_image_features, recursive=False)  # type: ignore[no-untyped-call]
        # Bound to the module, so that a copy of the model gets a method of its own.
        module.get_image_features = MethodType(showing, module)
        parameters = inspect.signature(type(model).forward).parameters
        return cls(tuple(name for name in TOKEN_TYPES if name in parameters), positions)

    def row_inputs(
        self,
        input_ids: NDArray[np.int64],
        image_features: NDArray[np.int64],
        plan: TreePlan,
        images: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return what the model reads of tokens, `(row_length,)`, besides ids, mask and depths, given its `images`."""
        inputs = dict.fromkeys(self.token_types, torch.from_numpy((image_features >= 0).astype(np.int64))[None])
        if self.positions is not None and plan.images:
            inputs["position_ids"] = self.positions.in_row(input_ids, image_features, plan, images)
        return inputs


def check_reads_images(model: nn.Module) -> nn.Module:
    """Return a model's part for images; one that a tree cannot give its images raises `UnsupportedImagesError`."""
    module = image_module(model)
    if module is None:
        raise UnsupportedImagesError(
            f"{type(model).__name__} reads no images (it has no get_image_features), and the dataset has some. Remove "
            "them, columns and parts of messages, to train on text, or load a model that reads images."
        )
    if reason := next(_faults(model, module), None):
        raise UnsupportedImagesError(f"{type(model).__name__} {reason}. {_WAY_OUT}")
    PathPositions.from_model(model)  # refuses positions that rows cannot give
    return module


def _faults(model: nn.Module, module: nn.Module) -> Iterator[str]:
    """Yield what a model does with images that a tree cannot give it, or that would not be the same in all turns."""
    names = _names(type(module).forward)
    merger = _names(type(module).inputs_merger) if "inputs_merger" in names else set()  # type: ignore[attr-defined]
    if not {"get_image_features", "masked_scatter"} <= names | merger:
        yield "does not put the features of its images in the places of placeholder tokens"
    for name in inspect.signature(type(model).forward).parameters:
        if name.endswith("token_type_ids") and name not in TOKEN_TYPES:
            yield f"reads {name}, which say more about a token than whether it belongs to an image"
    if names & _BLOCKS and not _keeps_images_apart(module):
        yield (
            "lets the tokens of images see more than their own image in both directions, so that what turns share is "
            "not the same in all of them"
        )
    for part in model.modules():  # a batch holds the images of one prompt in N-pass, and those of a row here
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            kind = type(part).__name__
            yield f"normalises over all images of a batch in its {kind}, so that their features depend on each other"


def _keeps_images_apart(module: nn.Module) -> bool:
    """Whether each of two images of two tokens, with text around them, is a block of its own."""
    block_ids = getattr(sys.modules[type(module).__module__], "get_block_sequence_ids_for_mask", None)
    kinds, expected = [[0, 1, 1, 0, 1, 1, 0]], [[-1, 0, 0, -1, 1, 1, -1]]
    return block_ids is not None and block_ids(torch.tensor(kinds), torch.device("cpu")).tolist() == expected


def _names(function: Any) -> set[str]:
    """Names that a function calls, binds or uses as keys."""
    code = inspect.unwrap(function).__code__
    texts = {text for text in code.co_consts if isinstance(text, str)}
    keywords = {name for part in code.co_consts if isinstance(part, tuple) for name in part if isinstance(name, str)}
    return {*code.co_names, *code.co_varnames, *texts, *keywords}


# Positions of several dimensions -------------------------------------------------------------------------------------


class UnsupportedImagesError(ValueError):
    """A model that reads images in a way that a tree cannot give it."""


@dataclass(frozen=True, slots=True, eq=False)
class PathPositions:
    """Positions of a row's tokens in all dimensions, computed from integers in the workers that load batches."""

    module: Any  # instance of the class that defines `get_rope_index`, with a configuration and nothing else
    parameters: frozenset[str]  # names of the parameters of that method

    @classmethod
    def from_model(cls, model: nn.Module) -> PathPositions | None:
        """Return the positions of a model, `None` if they are depths; what rows do not have is refused."""
        found: list[Any] = [module for module in model.modules() if hasattr(module, "get_rope_index")]
        if not found:
            return None
        parameters = frozenset(inspect.signature(found[-1].get_rope_index).parameters)
        if _GRID not in parameters or (unknown := parameters - _KNOWN):
            what = ", ".join(sorted(unknown)) if _GRID in parameters else f"no {_GRID}"
            raise UnsupportedImagesError(
                f"{type(found[-1]).__name__} computes the positions of image tokens from {what}, which rows of a "
                "single pass do not have. Train it on one sample per turn (N-pass) with TRL's SFTTrainer."
            )
        return cls(_without_parameters(found[-1]), parameters)

    def in_row(
        self,
        input_ids: NDArray[np.int64],
        image_features: NDArray[np.int64],
        plan: TreePlan,
        image_inputs: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the positions of a row, `(num_dimensions, 1, row_length)`, from its tokens and `image_inputs`."""
        positions: Tensor | None = None
        is_set = np.zeros(plan.length, np.bool_)
        for run in plan.runs:
            path = run.path_positions
            images = shown_numbers(image_features[path], plan.image_sizes)
            own = self._on_path(input_ids[path], image_features[path] >= 0, image_inputs[_GRID][images])
            if positions is None:
                positions = own.new_zeros(own.shape[0], plan.length)
            shared = torch.from_numpy(is_set[path])
            assert torch.equal(positions[:, path[is_set[path]]], own[:, shared]), "samples disagree on shared tokens"
            positions[:, path] = own
            is_set[path] = True
        assert positions is not None, "a row has at least one token"
        return positions[:, None]

    def _on_path(self, tokens: NDArray[np.int64], is_image: NDArray[np.bool_], grid: Tensor) -> Tensor:
        """Positions along one path, shape `(num_dimensions, path_length)`."""
        input_ids = torch.from_numpy(tokens)[None]
        given = {
            "input_ids": input_ids,
            "mm_token_type_ids": torch.from_numpy(is_image.astype(np.int64))[None],
            _GRID: grid if len(grid) else None,
            "attention_mask": torch.ones_like(input_ids),
        }
        positions, _ = self.module.get_rope_index(**{name: x for name, x in given.items() if name in self.parameters})
        own: Tensor = positions[:, 0].long()
        return own


def _without_parameters(module: nn.Module) -> nn.Module:
    """A module of the same class with its configuration and plain settings, but without parameters and submodules."""
    bare = type(module).__new__(type(module))
    nn.Module.__init__(bare)
    plain = (bool, int, float, str, type(None))
    bare.__dict__.update({name: value for name, value in vars(module).items() if isinstance(value, plain)})
    bare.config = module.config
    return bare
