"""`verify`: compares N-pass and the single pass on a user's own model, tokenizer and conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets.utils.tqdm import tqdm
from torch import nn

from ..attention.text_layers import set_text_attention
from ..data.bad_rows import read_all
from ..recurrent.layer import disable_tree_recurrence, runs_on_trees
from ..rendering.samples import render_example
from ..training.model import enable_tree, takes_attention_from_outside, without_adapters
from ..trees.sample import Sample
from .float64 import ForcedFloat64
from .npass import LossAndGradients, get_device, get_text_config, npass_loss_and_gradients
from .report import RowComparison, TurnComparison, VerifyReport
from .single_pass import leak_probe, single_pass_loss_and_gradients


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLOAT64_TOLERANCE = 1e-12
# The single pass and N-pass both carry rounding errors of about the measured size.
NOISE_FACTOR = 2.0


def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[object],
    *,
    tools: Sequence[Mapping[str, object]] | str | None = None,
    chat_template: str | None = None,
    max_rows: int | None = None,
    max_tokens: int | None = None,
) -> VerifyReport:
    """
    Check on your own model and data that the single pass computes what N separate samples would.

    N-pass runs twice, once with every weight moved by about one unit in the last place. The difference between the two
    runs is the error that the model's precision explains; the single pass may differ by at most twice as much. A
    float64 model must agree to 1e-12 instead, with the float32 parts of its code forced to float64. Gradients then
    show, exactly and in every precision, that no turn's output depends on a token outside its own sample.

    The model is left as it was: parameters, gradients, training mode, attention implementation and random state. It
    runs in evaluation mode, so without dropout and gradient checkpointing. Three sets of gradients and a second copy
    of the parameters must fit in memory beside it.

    Args:
        model (`PreTrainedModel`):
            Causal language model, or a `PeftModel` around one, whose adapter is compared.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        conversations (`Iterable`):
            Lists of messages, or examples as [`SinglePassSFTTrainer`] takes them.
        tools (`list` or `str`, *optional*):
            Tools for conversations that have none of their own.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's.
        max_rows (`int`, *optional*):
            Number of conversations to check, from the first. Defaults to all.
        max_tokens (`int`, *optional*):
            Length of the separate samples to check of each conversation, in tokens. Its first turns are checked as
            far as they fit, at least one; the report counts the others. Defaults to all.

    Returns:
        `VerifyReport`: `.ok` says whether everything agrees; `str()` of it is a table.

    Raises:
        `ValueError`: If there is no conversation, or some cannot be rendered; the error names all of these.

    Example:

    ```python
    report = verify(model, tokenizer, dataset, max_rows=4)
    assert report.ok, report
    ```
    """
    rendered = _render(list(islice(conversations, max_rows)), tokenizer, tools, chat_template)
    rows = [_first_turns(samples, max_tokens) for samples in rendered]
    return verify_samples(model, rows, num_left_out=sum(map(len, rendered)) - sum(map(len, rows)))


def verify_samples(model: PreTrainedModel, rows: Sequence[Sequence[Sample]], *, num_left_out: int = 0) -> VerifyReport:
    """
    Do what [`verify`] does with conversations that are samples already.

    Args:
        model (`PreTrainedModel`):
            Model, as in [`verify`].
        rows (`Sequence[Sequence[Sample]]`):
            Samples of each conversation.
        num_left_out (`int`, *optional*, defaults to 0):
            Turns that are not checked, for the report.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return VerifyReport(_compare_rows(model, rows, dtype), str(dtype).removeprefix("torch."), num_left_out)


def _render(
    conversations: Sequence[object],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, object]] | str | None,
    chat_template: str | None,
) -> list[list[Sample]]:
    def read(index: int, conversation: object) -> list[Sample]:
        row = dict(conversation) if isinstance(conversation, Mapping) else {"messages": conversation}
        if tools is not None and row.get("tools") is None:
            row["tools"] = tools
        return render_example(row, tokenizer, chat_template=chat_template, example_index=index)

    if not conversations:
        raise ValueError("Nothing to verify: `conversations` is empty. Pass at least one conversation.")
    return read_all(conversations, read, "given")


def _first_turns(samples: list[Sample], max_tokens: int | None) -> list[Sample]:
    if max_tokens is None:
        return samples
    num_fitting = int((np.cumsum([len(sample) for sample in samples]) <= max_tokens).sum())
    return samples[: max(num_fitting, 1)]


def _compare_rows(
    model: PreTrainedModel, rows: Sequence[Sequence[Sample]], dtype: torch.dtype
) -> tuple[RowComparison, ...]:
    num_passes = sum(2 * len(samples) + 3 for samples in rows)
    with (
        tqdm(total=num_passes, desc="Verifying", unit=" passes") as bar,
        _left_as_found(model) as attention,
        ForcedFloat64() if dtype is torch.float64 else nullcontext(),
    ):
        return tuple(
            _compare(model, index, samples, dtype, attention, bar.update) for index, samples in enumerate(rows)
        )


@contextmanager
def _left_as_found(model: PreTrainedModel) -> Iterator[str | None]:
    """Put the model on stock layers in evaluation mode; yield the tree attention it came with, if any."""
    base = without_adapters(model)
    modes = {module: module.training for module in model.modules()}
    attention = get_text_config(base)._attn_implementation
    was_on_trees = attention.startswith("tree_") or any(map(runs_on_trees, base.modules()))
    devices = [get_device(model)] if get_device(model).type == "cuda" else []
    model.eval()
    if was_on_trees:
        _leave_trees(base, "sdpa" if base._supports_sdpa else "eager")
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield attention if was_on_trees else None
    finally:
        if was_on_trees:
            enable_tree(base)
            _set_attention(base, attention)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _on_trees(model: PreTrainedModel, tree_attention: str | None) -> Iterator[None]:
    base = without_adapters(model)
    before = enable_tree(base)
    try:
        if tree_attention is not None:
            _set_attention(base, tree_attention)
        yield
    finally:
        _leave_trees(base, before)


def _leave_trees(base: PreTrainedModel, attention: str) -> None:
    disable_tree_recurrence(base)
    _set_attention(base, attention)


def _set_attention(base: PreTrainedModel, implementation: str) -> None:
    if takes_attention_from_outside(base):  # models with recurrent layers only cannot
        set_text_attention(base, implementation)


def _compare(
    model: PreTrainedModel,
    index: int,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    tree_attention: str | None,
    on_pass: Callable[[], object],
) -> RowComparison:
    # Both ways run once before they are timed: kernels are compiled, tuned and cached by shape.
    with _weights_moved_by_one_rounding(model):
        moved = npass_loss_and_gradients(model, samples, on_pass=on_pass)
    npass = npass_loss_and_gradients(model, samples, on_pass=on_pass)
    with _on_trees(model, tree_attention):
        single_pass_loss_and_gradients(model, samples)
        on_pass()
        single_pass = single_pass_loss_and_gradients(model, samples)
        on_pass()
        leak = leak_probe(model, samples)
        on_pass()
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
    # The error allowed is that of the whole row: the few tokens of a short turn may agree by luck.
    if moved is None:
        allowed = FLOAT64_TOLERANCE * _largest(torch.cat(npass.token_losses))
    else:
        allowed = NOISE_FACTOR * _largest(torch.cat(npass.token_losses) - torch.cat(moved.token_losses))
    turns = []
    losses = zip(samples, npass.token_losses, single_pass.token_losses, strict=True)
    for number, (sample, a, b) in enumerate(losses, start=1):
        weights = torch.from_numpy(sample.loss_weights[np.flatnonzero(sample.loss_weights)])
        if len(weights) == 0:
            continue
        turns.append(
            TurnComparison(
                row=index,
                turn=number,
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
def _weights_moved_by_one_rounding(model: nn.Module) -> Iterator[None]:
    """Multiply each weight by 1 + eps or 1 - eps at random, then restore the original tensors."""
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
