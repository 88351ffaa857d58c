"""Which module is the first whose outputs on a tree are not those on separate samples, and at which tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...recurrent.decoder import decoder_modules
from .row import CheckRow


# How many times larger than that of its input the difference of a module's output is, where the module is to blame.
_CLEAR_RATIO = 100.0
_LEAST_RATIO = 3.0


@dataclass(eq=False)
class _Call:
    """One call of a module, by the tokens that it read and returned."""

    name: str
    module: nn.Module
    given: Tensor | None
    returned: Tensor


@torch.enable_grad()  # also where an evaluation has turned gradients off
def mixing_module(model: Any, run: Callable[[CheckRow], Tensor], row: CheckRow) -> str | None:
    """
    Return the first module that lets branches depend on tokens that are not their ancestors, and one such token.

    The gradient of what it returns for a probe, with respect to what it was given for a foreign token, is zero in all
    modules that run before it, and in all that it is made of. Takes the model without adapters or wrappers.
    """
    length = len(row.row)
    with _recorded(model, lambda x: _by_token(x, (1, length)), keeps_graph=True) as calls:
        run(row)
    probes, foreign = torch.as_tensor(row.probes), torch.as_tensor(row.foreign)
    for call in calls:
        if call.given is None or not call.returned.requires_grad:
            continue
        output = _by_token(call.returned, (1, length))
        assert output is not None
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            output[probes.to(output.device)].float().square().sum(), call.given, retain_graph=True, allow_unused=True
        )
        if gradients[0] is None:
            continue
        tokens = _by_token(gradients[0], (1, length))
        assert tokens is not None
        effect = tokens.flatten(1).abs().amax(-1)[foreign.to(tokens.device)]
        if float(effect.max()) > 0:
            token = int(row.foreign[int(effect.argmax())])
            return _sentence(call, "lets the tokens of a branch depend on", token, row)
    return None


@torch.no_grad()
def differing_module(
    model: Any,
    run: Callable[[CheckRow], Tensor],
    run_separately: Callable[[CheckRow], Tensor],
    row: CheckRow,
    rounding_error: float,
) -> str | None:
    """Return the first module whose outputs differ on a tree though its inputs do not, and the first such token."""
    paths = torch.as_tensor(row.paths)
    with _recorded(model, lambda x: _by_token(x, (1, len(row.row)))) as on_tree:
        run(row)
    with _recorded(model, lambda x: _by_token(x, tuple(paths.shape))) as separately:
        run_separately(row)
    expected: defaultdict[str, list[_Call]] = defaultdict(list)  # of each module, in their order
    for call in separately:
        expected[call.name].append(call)
    worst, found = _LEAST_RATIO, None
    for call in on_tree:
        other = expected[call.name].pop(0) if expected[call.name] else None
        errors = None if other is None else _errors(call.returned, other.returned, paths)
        if other is None or errors is None:
            continue
        given = None if call.given is None or other.given is None else _errors(call.given, other.given, paths)
        ratio = float(errors.max()) / max(rounding_error, 0.0 if given is None else float(given.max()))
        if ratio > worst:
            token = int(row.paths.flatten()[int((errors > errors.max() / 4).nonzero()[0, 0])])
            worst, found = ratio, _sentence(call, "returns something else for", token, row)
        if ratio > _CLEAR_RATIO:
            break
    return found


@contextmanager
def _recorded(
    model: Any, by_token: Callable[[Tensor], Tensor | None], *, keeps_graph: bool = False
) -> Iterator[list[_Call]]:
    """Collect the calls of a model's modules that read tokens, in the order in which they end."""
    calls: list[_Call] = []
    names = {module: name for name, module in model.named_modules()}
    inputs: dict[nn.Module, list[Tensor | None]] = {}

    def copied(x: Tensor | None) -> Tensor | None:  # some adapters add to outputs in place
        own = None if x is None else by_token(x)
        return None if own is None else own.clone()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        given = next((x for x in (*args, *kwargs.values()) if _is_of_tokens(x, by_token)), None)
        if given is not None and keeps_graph:  # a tensor of its own, which the module alone reads
            own = given.clone() if given.requires_grad else given.detach().clone().requires_grad_()
            inputs.setdefault(module, []).append(own)
            return (
                tuple(own if x is given else x for x in args),
                {name: own if x is given else x for name, x in kwargs.items()},
            )
        inputs.setdefault(module, []).append(copied(given))
        return None

    def after(module: nn.Module, args: object, kwargs: object, output: Any) -> None:
        given = inputs[module].pop()
        values = output if isinstance(output, tuple | list) else [output]
        returned = next((x for x in values if _is_of_tokens(x, by_token)), None)
        if returned is not None:
            kept = returned if keeps_graph else copied(returned)
            assert kept is not None
            calls.append(_Call(names.get(module, type(module).__name__), module, given, kept))

    handles = []
    for module in decoder_modules(model):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _is_of_tokens(x: object, by_token: Callable[[Tensor], Tensor | None]) -> bool:
    return isinstance(x, Tensor) and x.dtype.is_floating_point and x.dim() > 1 and by_token(x) is not None


def _by_token(x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return a tensor with one entry per token: `(batch, length, …)` or `(batch · length, …)` → `(tokens, …)`."""
    if tuple(x.shape[:2]) == shape:
        return x.flatten(0, 1)
    return x if x.dim() > 1 and x.shape[0] == shape[0] * shape[1] else None


def _errors(on_tree: Tensor, separately: Tensor, paths: Tensor) -> Tensor | None:
    """Return how much each token of the samples differs, `(N · S,)`; `None` if the tensors cannot be compared."""
    found = on_tree[paths.flatten().to(on_tree.device)]
    if found.shape != separately.shape:
        return None
    found, expected = found.flatten(1).float(), separately.flatten(1).float()
    errors: Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return errors


def _sentence(call: _Call, what: str, token: int, row: CheckRow) -> str:
    name = f"{call.name or 'the model'} ({type(call.module).__name__})"
    return f"{name} {what} token {token} of {len(row.row)} in the row of the check"
