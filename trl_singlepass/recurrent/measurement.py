"""
How each layer of a model runs on a tree: measured on a small row, and never read from its code.

The model runs once on a row with branches, whose attention follows the tree. Each of its modules is then run alone, on
what it got there: on the row, and along each path of the tree by itself, as separate samples run. A module is right if
no token depends on one that is not its ancestor (the gradient is exactly zero), and both ways give the same. The
innermost modules that are not right, and get the cache or the mask of attention, run in another way: the first of
these that gives what whole paths give, gradients too.

    by kernels    once over the row; the functions that mix tokens are interposed ([`row_kernels`])
    from states   each branch from the state at its fork, in a copy of the model's own cache ([`ForkStates`])
    with reach    each branch after the few tokens of its history that it depends on
    whole paths   each branch after all of its history; always right

Layers of one class and configuration are measured once.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel, logging
from transformers.masking_utils import sdpa_mask
from transformers.utils import ModelOutput

from ..attention.context import Tree, running_on
from ..attention.registry import set_text_attention
from ..attention.sdpa import sdpa_forward
from ..attention.tree_mask import TreeMask, tree_mask_or
from ..trees.rows import TreePlan
from .decoder import decoder_modules, get_decoder, in_evaluation_mode, takes_attention_from_outside
from .layer import TreeReplay, by_name, carries_tree, pass_tree_in_masks, run_on_tree, runs_on_trees, unwrap, wrap
from .row_kernels import interpose_kernels, observe_kernels
from .scan_check import WrongKernelError
from .schedule import ReplayMode
from .states import ForkStates, map_tensors


T = TypeVar("T")

logger = logging.get_logger(__name__)

# 48 tokens in a line, a branch of 15 that leaves it after 39 tokens, and one of 21 that leaves it after 27.
SUBTREE_END = np.repeat([84, 63, 48, 63, 84], [27, 12, 9, 15, 21])
_ATTENTION = "tree_measured"  # with which models are measured: that of `tree_torch`, which notes who calls it
_ROUNDED = {torch.float16: 2e-2, torch.bfloat16: 5e-2}  # errors of results, relative to their norm; otherwise 1e-4
_OF_GRADIENTS = 100  # times as large errors as of outputs, in layers that compute a part in float32

_known: WeakKeyDictionary[PreTrainedModel, dict[nn.Module, TreeReplay]] = WeakKeyDictionary()


_attending: set[nn.Module] = set()


def _noting_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    _attending.add(module)
    return sdpa_forward(module, *args, **kwargs)


AttentionInterface.register(_ATTENTION, _noting_attention)
AttentionMaskInterface.register(_ATTENTION, tree_mask_or(sdpa_mask))


def path_dependent_layers(model: PreTrainedModel) -> dict[nn.Module, ReplayMode]:
    """Return the outermost layers that a mask alone does not bring onto a tree, with how each runs on one."""
    return {layer: replay.mode for layer, replay in measured_layers(model).items()}


def measured_layers(model: PreTrainedModel) -> dict[nn.Module, TreeReplay]:
    """Return the same with all that was measured of them, once for each model."""
    on_trees = {layer: layer._replay for layer in decoder_modules(model) if runs_on_trees(layer)}
    if on_trees:
        return on_trees  # type: ignore[return-value]
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return {}  # sharded as it was loaded, its layers do not run alone: what is not right, the check refuses
    if model not in _known:
        _known[model] = _measured_on_first_rank(model) if _others_have_no_weights() else _Measurement(model).run()
    return {layer: replay for layer, replay in _known[model].items() if layer in set(model.modules())}


def _others_have_no_weights() -> bool:
    """Whether the first rank alone has loaded the weights, which FSDP will shard."""
    asked = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("1", "true")
    return asked and torch.distributed.is_available() and torch.distributed.is_initialized()


def _measured_on_first_rank(model: PreTrainedModel) -> dict[nn.Module, TreeReplay]:
    names = {module: name for name, module in model.named_modules()}
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        found = [{names[layer]: replay for layer, replay in _Measurement(model).run().items()}]
    torch.distributed.broadcast_object_list(found)
    layers = {model.get_submodule(name): replay for name, replay in found[0].items()}
    for layer in layers:
        interpose_kernels(layer)
    return layers


def path_dependent_layer_names(model: PreTrainedModel) -> list[str]:
    """Return the class names of [`path_dependent_layers`], for messages."""
    return sorted({type(layer).__name__ for layer in path_dependent_layers(model)})


def enable_tree_recurrence(model: PreTrainedModel) -> None:
    """
    Make path-dependent layers run on trees, before the model's attention is switched to trees.

    Raises `ValueError` if attention that selects tokens runs on another kernel than PyTorch's.
    """
    attention = str(model.config.get_text_config()._attn_implementation)
    measured = measured_layers(model).items()
    layers = {x: replace(replay, attention=attention) for x, replay in measured if not runs_on_trees(x)}
    for layer, replay in layers.items():
        if replay.mode.attends and replay.attention not in ("eager", "sdpa"):
            raise ValueError(
                f"{type(layer).__name__} selects the tokens that it attends to, which on a tree works with "
                f"attn_implementation='sdpa' or 'eager', not {replay.attention!r}. Load the model with one of these."
            )
    for layer, replay in layers.items():
        wrap(layer, replay)
    if layers:
        model._tree_handles = pass_tree_in_masks(model, layers)


def disable_tree_recurrence(model: PreTrainedModel) -> None:
    """Undo [`enable_tree_recurrence`]."""
    for layer in filter(runs_on_trees, model.modules()):
        unwrap(layer)
    for handle in vars(model).pop("_tree_handles", ()):
        handle.remove()


@dataclass(eq=False)
class _Call:
    """One call of a module on the row."""

    module: nn.Module
    arguments: dict[str, Any]
    inner: list[_Call] = field(default_factory=list)  # calls that it makes


class _Measurement:
    """Measures one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.plan = TreePlan.from_subtree_end(SUBTREE_END)
        device = next(
            (x.device for x in get_decoder(model).parameters() if x.device.type != "meta"), torch.device("cpu")
        )
        end, depth = (torch.from_numpy(x)[None].to(device) for x in (SUBTREE_END, self.plan.depths()))
        self.tree = Tree(self.plan, end, depth)
        self.paths = [run.path_positions for run in self.plan.runs]
        self.attention = str(model.config.get_text_config()._attn_implementation)
        self.kinds = {module: _kind_of(module) for module in decoder_modules(model)}
        self.found: dict[Any, TreeReplay] = {}  # by kind of layer
        self.right: set[Any] = set()
        self.listed = {x for part in model.modules() if isinstance(part, nn.ModuleList) for x in part}
        self.empty_cache: Any = None
        self.cache_names: dict[nn.Module, tuple[str, ...]] | None = None

    def run(self) -> dict[nn.Module, TreeReplay]:
        """Return the layers that do not run on a tree as they are, with how each does."""
        model = self.model
        with _unchanged(model), in_evaluation_mode(model), attention_of(model, _ATTENTION), torch.enable_grad():
            while True:
                with self._wrapped() as layers:
                    calls, stopped = self._record()
                    failing = list(self._failing(calls)) if stopped is None else [stopped]
                    new = {self.kinds[call.module]: call for call in failing if call.module not in layers}
                if not new:
                    _attending.clear()
                    return layers
                for kind, call in new.items():
                    attends = stopped is not None or not _attending.isdisjoint(call.module.modules())
                    replay = self._replay_of(call, attends=attends)
                    if replay is None:
                        self.right.add(kind)
                    else:
                        self.found[kind] = replay

    @contextmanager
    def _wrapped(self) -> Iterator[dict[nn.Module, TreeReplay]]:
        """Run the outermost layers as they have been found to run."""
        layers: dict[nn.Module, TreeReplay] = {}
        inside: set[nn.Module] = set()
        for module in decoder_modules(self.model):
            if module not in inside and (replay := self.found.get(self.kinds[module])) is not None:
                layers[module] = replay
                inside |= set(module.modules())
        for layer, replay in layers.items():
            wrap(layer, replay)
        try:
            yield layers
        finally:
            for layer in layers:
                unwrap(layer)

    # Which layers are not right -------------------------------------------------------------------------------------

    def _record(self) -> tuple[list[_Call], _Call | None]:
        """Run the row; return the calls of the outermost modules, and the one at which the model stopped, if any."""
        stack = [_Call(self.model, {})]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = map_tensors(by_name(module, args, kwargs), lambda x, path: x.detach().clone())
            stack[-1].inner.append(_Call(module, arguments))
            stack.append(stack[-1].inner[-1])

        handles = pass_tree_in_masks(self.model, decoder_modules(self.model))
        for module in decoder_modules(self.model):
            if module is not self.model:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
        # The whole model: where a part of it runs first, transformers collects what routers return twice.
        with _gathered_in_turn(self.model), running_on(self.tree), torch.no_grad():
            is_done = _attempt(lambda: self.model(**_inputs_of(self.model, self.tree)), self.model)
        for handle in handles:
            handle.remove()
        if is_done is not None:
            return stack[0].inner, None
        # A submodule that gets the mask may stop, or what is made of it: the module around is measured next.
        return stack[0].inner, next((call for call in reversed(stack) if _has_tree_mask(call)), None)

    def _failing(self, calls: Sequence[_Call]) -> Iterator[_Call]:
        """Yield the innermost calls that are not right on the row, of layers that may run in another way."""
        for call in calls:
            kind = self.kinds[call.module]
            if kind in self.right:
                continue
            with _gathered(call.module):
                is_right = _attempt(lambda call=call: self._is_right(call), call.module)  # type: ignore[misc]
            if is_right:
                self.right.add(kind)
                continue
            inner = list(self._failing(call.inner))
            yield from inner
            if not inner and is_right is False and self._may_be_replayed(call):  # not `None`: it does not run alone
                yield call

    def _is_right(self, call: _Call) -> bool | None:
        """Whether a module is right on the row; `None` if it neither takes nor returns tokens in their order."""
        with running_on(self.tree):
            arguments, leaves = self._with_leaves(call.arguments)
            output = call.module(**arguments)
        on_row = self._of_tokens(output)
        if not leaves or not on_row or isinstance(output, ModelOutput):
            return None
        if any(self._leaks(output, leaves) for output in on_row if output.requires_grad):
            return False
        # By its own attention: some models do something else for names that they do not know (MiniMax-M3).
        own = self.attention if self.attention in ("eager", "sdpa") else _ATTENTION
        with torch.no_grad(), attention_of(self.model, own):
            alone = self._of_tokens(run_on_tree(call.module, call.arguments, self.tree, self._whole_paths(True)))
        return _are_equal(on_row, alone)

    def _leaks(self, output: Tensor, leaves: Sequence[Tensor]) -> bool:
        """Whether a token depends on one that is not its ancestor."""
        for path in self.paths:
            foreign = np.setdiff1d(np.arange(self.plan.length), path)
            for gradient in self._effects(output, path[-1], leaves):
                if bool(gradient[:, torch.from_numpy(foreign).to(gradient.device)].any()):
                    return True
        return False

    def _effects(self, output: Tensor, token: int, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the output for a token, in an arbitrary direction."""
        own = output[:, token].flatten()
        total = own @ torch.linspace(0.5, 1.5, len(own)).to(own)
        return _present(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True))

    def _whole_paths(self, attends: bool) -> TreeReplay:
        return TreeReplay(ReplayMode(starts_from_state=False, attends=attends), attention=self.attention)

    def _may_be_replayed(self, call: _Call) -> bool:
        """
        Whether a layer remembers tokens: it gets the cache or the mask. Others mix tokens in a way that generation
        does not repeat. They are left to the check, and so is a decoder layer that contains one.
        """
        return call.module not in self.listed and (_has_tree_mask(call) or bool(self._cache_of(call)[0]))

    # How the others run ---------------------------------------------------------------------------------------------

    def _replay_of(self, call: _Call, *, attends: bool) -> TreeReplay | None:
        whole = replace(self._whole_paths(attends), distances=tuple(self._distances(call)))
        if attends:
            return whole
        with _gathered(call.module):
            copies = [_copied(call, dtype) for dtype in (torch.float64, None)]
        layer, arguments = copies[0]
        expected = _attempt(lambda: self._results(layer, arguments, whole), layer)
        if expected is None:  # some kernels have no float64
            layer, arguments = copies[1]
            expected = _attempt(lambda: self._results(layer, arguments, whole), layer)
        if expected is None:  # nothing can be shown: left to the check
            return None

        def gives_the_same(replay: TreeReplay) -> bool:
            found = _attempt(lambda: self._results(layer, arguments, replay), layer)
            return found is not None and all(map(_are_equal, found, expected, (1, _OF_GRADIENTS)))

        ways = [replace(whole, mode=replace(whole.mode, reach=self._reach(layer, arguments, whole)))]
        names, empty = self._cache_of(call)
        if names:
            ways = [replace(way, cache_names=names, empty_cache=empty) for way in ways]
            ways.append(replace(ways[0], mode=ReplayMode(starts_from_state=True)))
            whole = replace(whole, cache_names=names)
        chosen = next((way for way in ways if way.mode != whole.mode and gives_the_same(way)), whole)
        if not interpose_kernels(layer):
            return chosen
        unused = {name for name, value in arguments.items() if carries_tree(value)} | set(names)
        observed = _attempt(lambda: observe_kernels(layer, {**arguments, **dict.fromkeys(unused)}, self.tree), layer)
        fast = replace(chosen, kernels=observed)
        if observed is not None and gives_the_same(fast):
            return fast
        way = "piece by piece" if chosen.mode != whole.mode else "each branch with all of its history"
        logger.warning_once(
            f"{type(call.module).__name__} runs on trees {way}, which takes longer than once over the row: its "
            "convolution or scan is none that trl-singlepass knows, or gives something else than along whole paths."
        )
        return chosen

    def _results(
        self, layer: nn.Module, arguments: dict[str, Any], replay: TreeReplay
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of a layer, and the gradients of its inputs and parameters."""
        arguments, leaves = self._with_leaves(arguments)
        outputs = self._of_tokens(run_on_tree(layer, arguments, self.tree, replay))
        parameters = [x for x in layer.parameters() if x.is_floating_point() and x.requires_grad]
        random = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=random).to(x) for x in outputs]
        gradients = torch.autograd.grad(outputs, [*leaves, *parameters], weights, allow_unused=True)
        return [x.detach() for x in outputs], _present(gradients)

    def _reach(self, layer: nn.Module, arguments: dict[str, Any], whole: TreeReplay) -> int | None:
        """Return how many tokens back outputs depend on, `None` for all."""
        arguments, leaves = self._with_leaves(arguments)
        reach = 0
        for output in self._of_tokens(run_on_tree(layer, arguments, self.tree, whole)):
            for path in self.paths:
                for effect in self._effects(output, path[-1], leaves):
                    of_path = effect[0, torch.from_numpy(path).to(effect.device)].flatten(1).any(-1)
                    reach = max(reach, len(path) - 1 - int(of_path.nonzero()[0]))
        return reach if reach < max(map(len, self.paths)) - 1 else None

    def _cache_of(self, call: _Call) -> tuple[tuple[str, ...], Any]:
        """Return the arguments in which a layer takes a cache, and an empty one, as the model makes it."""
        if self.cache_names is None:
            self.cache_names = {}
            handles = [
                module.register_forward_pre_hook(self._see_cache, with_kwargs=True)
                for module in decoder_modules(self.model)
                if module is not self.model
            ]
            ids = _inputs_of(self.model, self.tree)["input_ids"]
            with _gathered_in_turn(self.model), torch.no_grad():
                _attempt(lambda: self.model(input_ids=ids, use_cache=True), self.model)
            for handle in handles:
                handle.remove()
        if self.empty_cache is not None:
            return self.cache_names.get(call.module, ()), self.empty_cache
        # The model does not run with a cache (one of recurrent layers alone): an argument that is used as one.
        empty = DynamicCache(config=self.model.config)
        for name in [name for name, value in call.arguments.items() if value is None]:
            own = ForkStates(empty)
            arguments = {**call.arguments, name: own.cache}
            with torch.no_grad():
                _attempt(partial(call.module, **arguments), call.module)
            if own.tensors():
                return (name,), empty
        return (), None

    def _see_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.cache_names is not None
        caches = {name: x for name, x in by_name(module, args, kwargs).items() if isinstance(x, Cache)}
        if caches and self.empty_cache is None:
            self.empty_cache = copy.deepcopy(next(iter(caches.values())))
        self.cache_names[module] = tuple(caches)

    def _distances(self, call: _Call) -> Iterator[str]:
        """Yield the names of arguments that hold how far each pair of tokens of the row is apart."""
        index = torch.arange(self.plan.length)
        for name, value in call.arguments.items():
            if isinstance(value, Tensor) and torch.equal(
                value.detach().cpu(), (index[:, None] - index).to(value.dtype)
            ):
                yield name

    # Tensors of tokens ----------------------------------------------------------------------------------------------

    def _is_of_tokens(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and tuple(x.shape[:2]) == (1, self.plan.length)

    def _with_leaves(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        """Return arguments whose tensors of tokens require gradients, and these."""
        leaves: list[Tensor] = []

        def leaf(x: Tensor, _: object) -> Tensor:
            if not self._is_of_tokens(x):
                return x
            leaves.append(x.detach().clone().requires_grad_())
            return leaves[-1].clone()  # some layers write to their inputs

        return map_tensors(arguments, leaf), leaves

    def _of_tokens(self, outputs: Any) -> list[Tensor]:
        found: list[Tensor] = []
        map_tensors(outputs, lambda x, _: found.append(x) if self._is_of_tokens(x) else None)
        return found


def _kind_of(module: nn.Module) -> Any:
    """Return what layers that are measured once have in common: classes, sizes of parameters, settings but numbers."""

    def setting(value: object) -> object:
        return value if isinstance(value, str | bool | float | type(None)) else type(value)

    return tuple(
        (
            type(part),
            tuple((name, tuple(x.shape)) for name, x in part.named_parameters(recurse=False)),
            tuple((name, setting(value)) for name, value in vars(part).items() if not name.startswith("_")),
        )
        for part in module.modules()
    )


def _present(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients that are there; mypy takes those of autograd to be."""
    return [x for x in gradients if x is not None]


def _attempt(function: Callable[[], T], module: nn.Module) -> T | None:
    """Return what a function returns, `None` where code stops that was not written for trees or for running alone."""
    try:
        return function()
    except (WrongKernelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        logger.debug("%s: %s: %s", type(module).__name__, type(error).__name__, error)
        return None


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give modules back the tensors that they kept; some keep their states themselves (Recurrent Gemma)."""
    kept = [
        (vars(part), name, x) for part in model.modules() for name, x in vars(part).items() if _may_be_state(name, x)
    ]
    try:
        yield
    finally:
        for attributes, name, x in kept:
            attributes[name] = x


def _may_be_state(name: str, value: object) -> bool:
    return value is None or (isinstance(value, Tensor) and not name.startswith("_"))


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run a model with another attention, if it takes any from outside."""
    if not takes_attention_from_outside(model):
        yield
        return
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    configs += [
        part for config in configs for part in map(partial(getattr, config), getattr(config, "sub_configs", ()))
    ]
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    set_text_attention(model, implementation)
    try:
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


@contextmanager
def _gathered(module: nn.Module, *, recurse: bool = True) -> Iterator[None]:
    """Gather the parameters of a module that ZeRO-3 shards; all ranks run the same."""
    parameters = [x for x in module.parameters(recurse) if hasattr(x, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def _gathered_in_turn(model: nn.Module) -> Iterator[None]:
    """Gather parameters that ZeRO-3 shards while their modules run, those of one layer at a time."""
    contexts = ExitStack()
    running: list[Any] = []

    def enter(module: nn.Module, args: object, *, recurse: bool) -> None:
        running.append(_gathered(module, recurse=recurse))
        running[-1].__enter__()

    def leave(module: nn.Module, *args: object) -> None:
        running.pop().__exit__(None, None, None)

    is_sharded = any(hasattr(x, "ds_id") for x in model.parameters())
    for module, recurse in dict(_units(model)).items() if is_sharded else ():
        contexts.callback(module.register_forward_pre_hook(partial(enter, recurse=recurse)).remove)
        contexts.callback(module.register_forward_hook(leave).remove)
    with contexts:
        yield
    while running:  # those of a model that stopped
        leave(model)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Yield modules whose parameters are gathered together, and whether those of their parts are among them."""
    has_list = any(isinstance(part, nn.ModuleList) for part in module.modules())
    yield module, not has_list
    if has_list:
        for child in module.children():
            yield from _units(child)


def _inputs_of(model: nn.Module, tree: Tree) -> dict[str, Any]:
    """Return what a model reads of a row of arbitrary tokens."""
    ids = torch.arange(3, 3 + tree.plan.length, device=tree.depth.device)[None]
    inputs = {"input_ids": ids, "position_ids": tree.depth, "attention_mask": torch.ones_like(ids), "use_cache": False}
    parameters = inspect.signature(type(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in inputs.items() if takes_any or name in parameters}


def _has_tree_mask(call: _Call) -> bool:
    return any(isinstance(value, TreeMask) for value in call.arguments.values())


def _copied(call: _Call, dtype: torch.dtype | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of a layer and of its arguments, in another dtype if one is given."""

    def converted(x: Tensor, _: object = None) -> Tensor:
        return x if dtype is None or not x.is_floating_point() else x.detach().to(dtype)

    tensors = {**dict(call.module.named_parameters()), **dict(call.module.named_buffers())}
    memo = {}
    for x in tensors.values():
        if x.is_floating_point():
            own = converted(x.detach().clone())
            memo[id(x)] = nn.Parameter(own) if isinstance(x, nn.Parameter) else own
    states = (x for part in call.module.modules() for name, x in vars(part).items() if _may_be_state(name, x))
    memo |= {id(x): x.detach() for x in states if isinstance(x, Tensor)}
    layer: Any = copy.deepcopy(call.module, memo)
    layer._stock_forward = layer.forward
    return layer, map_tensors(call.arguments, converted)


def _are_equal(found: Sequence[Tensor], expected: Sequence[Tensor], factor: float = 1) -> bool:
    def is_equal(x: Tensor, y: Tensor) -> bool:
        allowed = factor * _ROUNDED.get(x.dtype, 1e-4)
        return x.shape == y.shape and float((x - y).norm()) <= allowed * float(y.norm())

    return len(found) == len(expected) and all(map(is_equal, found, expected))
