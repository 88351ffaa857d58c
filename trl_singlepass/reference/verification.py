"""`verify`: N-pass and the single pass on a user's own model, tokenizer and conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.bad_rows import read_all
from ..recurrent.layer import disable_tree_recurrence, runs_on_trees
from ..rendering.samples import render_example
from ..training.model import enable_tree, without_adapters
from ..trees.sample import Sample
from .float64 import ForcedFloat64
from .npass import LossAndGradients, device_of, npass_loss_and_gradients, text_config
from .report import RowComparison, TurnComparison, VerifyReport
from .single_pass import leak_probe, single_pass_loss_and_gradients


FLOAT64_TOLERANCE = 1e-12
# The single pass and N-pass both carry rounding errors of about the size that is measured.
NOISE_FACTOR = 2.0


def verify(
    model: nn.Module,
    tokenizer: Any,
    conversations: Iterable[Any],
    *,
    tools: Any = None,
    chat_template: str | None = None,
    max_rows: int | None = None,
) -> VerifyReport:
    """
    Check on your own model and data that the single pass computes what N separate samples would.

    Each conversation is run three times: as separate samples, as separate samples by a model whose weights are all
    moved by about one unit in the last place, and as one prefix tree. The second run measures how much of a
    difference the precision of the model's dtype explains: its distance from the first is the error that one rounding
    of each weight makes. The single pass agrees if it is no further away than twice that. A float64 model is held to
    1e-12 instead, with the float32 parts of its code forced to float64.

    In addition, gradients show that no turn's output depends on a token outside its own sample. That is exact in
    every precision.

    The model is left as it was: parameters, gradients, training mode, attention implementation and random state. It
    runs in evaluation mode, so without dropout and gradient checkpointing; three sets of gradients and a second copy
    of the parameters must fit beside it.

    Args:
        model (`torch.nn.Module`):
            Causal language model of transformers, or a `PeftModel` around one (of which the adapter is compared).
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        conversations (`Iterable`):
            Lists of messages, or dataset rows: dictionaries with `messages`, or `prompt` and `completion`, and
            whatever else [`SinglePassSFTTrainer`] accepts beside them.
        tools (`list` or `str`, *optional*):
            Tools for conversations that bring none of their own.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's.
        max_rows (`int`, *optional*):
            Number of conversations to check, from the first. All by default.

    Returns:
        `VerifyReport`: `.ok` says whether all agrees; `str()` of it is a table.

    Raises:
        `ValueError`: If there is no conversation, or some cannot be rendered; all of these are named.

    Example:

    ```python
    report = verify(model, tokenizer, dataset, max_rows=4)
    print(report)
    assert report.ok
    ```
    """

    def read(index: int, conversation: Any) -> list[Sample]:
        row = dict(conversation) if isinstance(conversation, Mapping) else {"messages": conversation}
        if tools is not None and row.get("tools") is None:
            row["tools"] = tools
        return render_example(row, tokenizer, chat_template=chat_template, example_index=index)

    rows = read_all(list(islice(conversations, max_rows)), read, "given")
    if not rows:
        raise ValueError("Nothing to verify: `conversations` is empty. Pass at least one conversation.")
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    with _left_as_found(model) as attention, ForcedFloat64() if dtype is torch.float64 else nullcontext():
        compared = tuple(_compare(model, index, samples, dtype, attention) for index, samples in enumerate(rows))
    return VerifyReport(compared, str(dtype).removeprefix("torch."))


@contextmanager
def _left_as_found(model: Any) -> Iterator[str | None]:
    """Take the model off trees and to evaluation; yield the tree attention that it came with, as a trainer's does."""
    base = without_adapters(model)
    modes = {module: module.training for module in model.modules()}
    attention = text_config(base)._attn_implementation
    came_on_trees = attention.startswith("tree_") or any(map(runs_on_trees, base.modules()))
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    model.eval()
    if came_on_trees:
        _leave_trees(base, "sdpa" if base._supports_sdpa else "eager")
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield attention if came_on_trees else None
    finally:
        if came_on_trees:
            enable_tree(base)
            _set_attention(base, attention)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _on_trees(model: Any, tree_attention: str | None) -> Iterator[None]:
    base = without_adapters(model)
    before = enable_tree(base)
    try:
        if tree_attention is not None:
            _set_attention(base, tree_attention)
        yield
    finally:
        _leave_trees(base, before)


def _leave_trees(base: Any, attention: str) -> None:
    disable_tree_recurrence(base)
    _set_attention(base, attention)


def _set_attention(base: Any, implementation: str) -> None:
    if base._can_set_attn_implementation():  # some models have recurrent layers only
        base.set_attn_implementation(implementation)


def _compare(
    model: Any, index: int, samples: Sequence[Sample], dtype: torch.dtype, tree_attention: str | None
) -> RowComparison:
    # The run with moved weights comes first: it warms up the device for the two that are timed.
    with _moved_by_one_rounding(model):
        moved = npass_loss_and_gradients(model, samples)
    npass = npass_loss_and_gradients(model, samples)
    with _on_trees(model, tree_attention):
        single_pass = single_pass_loss_and_gradients(model, samples)
        leak = leak_probe(model, samples)
    is_float64 = dtype is torch.float64
    difference = {name: single_pass.gradients[name] - gradient for name, gradient in npass.gradients.items()}
    noise = _norm({name: moved.gradients[name] - gradient for name, gradient in npass.gradients.items()})
    norm = max(_norm(npass.gradients), torch.finfo(dtype).tiny)
    worst = max(difference, key=lambda name: float(difference[name].abs().max()))
    return RowComparison(
        turns=_compare_turns(index, samples, npass, single_pass, None if is_float64 else moved),
        npass_loss=npass.loss,
        single_pass_loss=single_pass.loss,
        weight=sum(float(sample.loss_weights.sum()) for sample in samples),
        gradient_error=_norm(difference) / norm,
        gradient_allowed=FLOAT64_TOLERANCE if is_float64 else NOISE_FACTOR * noise / norm,
        gradient_max_error=float(difference[worst].abs().max()),
        worst_parameter=worst,
        npass_tokens=npass.num_tokens,
        single_pass_tokens=single_pass.num_tokens,
        npass_seconds=npass.seconds,
        single_pass_seconds=single_pass.seconds,
        leak=leak,
    )


def _compare_turns(
    index: int,
    samples: Sequence[Sample],
    npass: LossAndGradients,
    single_pass: LossAndGradients,
    moved: LossAndGradients | None,
) -> tuple[TurnComparison, ...]:
    # Over the whole row: a turn of few tokens can come out nearly equal by luck.
    if moved is None:
        allowed = FLOAT64_TOLERANCE * _largest(torch.cat(npass.token_losses))
    else:
        allowed = NOISE_FACTOR * _largest(torch.cat(npass.token_losses) - torch.cat(moved.token_losses))
    turns = []
    for sample, a, b in zip(samples, npass.token_losses, single_pass.token_losses, strict=True):
        weights = torch.from_numpy(sample.loss_weights[np.flatnonzero(sample.loss_weights)])
        if len(weights) == 0:
            continue
        turns.append(
            TurnComparison(
                row=index,
                message_index=sample.message_index,
                num_tokens=len(weights),
                npass_loss=float((a * weights).sum() / weights.sum()),
                single_pass_loss=float((b * weights).sum() / weights.sum()),
                error=_largest(a - b),
                allowed=allowed,
            )
        )
    return tuple(turns)


@contextmanager
def _moved_by_one_rounding(model: nn.Module) -> Iterator[None]:
    """Multiply each weight by 1 + eps or 1 - eps, at random, and put back the original memory afterwards."""
    kept = {parameter: parameter.data for parameter in model.parameters() if parameter.is_floating_point()}
    try:
        for seed, (parameter, data) in enumerate(kept.items()):
            generator = torch.Generator(data.device).manual_seed(seed)
            signs = torch.randint(0, 2, data.shape, generator=generator, device=data.device, dtype=torch.int8) * 2 - 1
            parameter.data = data * (1 + torch.finfo(data.dtype).eps * signs).to(data.dtype)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())
