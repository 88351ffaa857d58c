"""`verify`: compares N-pass and the single pass on a user's own model, tokenizer and conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets.utils.tqdm import tqdm
from torch import nn
from torch.overrides import TorchFunctionMode

from ..attention.registry import set_text_attention
from ..data.bad_rows import read_all
from ..data.collator import LoadImages
from ..data.pairs import example_to_turns
from ..data.reader import with_chat_template
from ..engine.check.checked_model import get_device
from ..engine.check.tree_check import check_tree
from ..engine.enable import disable_tree, enable_tree, without_adapters
from ..images.loading import image_loader_of
from ..images.reading import ImageReader, image_module
from ..recurrent.decoder import in_evaluation_mode, takes_attention_from_outside
from ..recurrent.layer import runs_on_trees
from ..trees.prefix_tree import PrefixTree
from ..trees.sample import Sample
from .npass import LossAndGradients, get_text_config, npass_loss_and_gradients
from .report import RowComparison, TurnComparison, VerifyReport
from .single_pass import RowImages, collator_of, leak_probe, make_batch, single_pass_loss_and_gradients


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

FLOAT64_TOLERANCE = 1e-12
# The single pass and N-pass both carry rounding errors of about the measured size.
NOISE_FACTOR = 2.0


def verify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
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
    show, exactly and in every precision, that no turn's output depends on a token outside its own sample. Last comes
    the check that trainers make before their first step ([`check_tree`]).

    The model is left as it was: parameters, gradients, training mode, attention implementation and random state. It
    runs in evaluation mode, so without dropout and gradient checkpointing. Three sets of gradients and a second copy
    of the parameters must fit in memory beside it.

    Args:
        model (`PreTrainedModel`):
            Causal language model, or a `PeftModel` around one, whose adapter is compared.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer with a chat template; for conversations with images, the processor.
        conversations (`Iterable`):
            Lists of messages, or examples as [`SinglePassSFTTrainer`] takes them, with their weights and `history`.
            Preference pairs are checked with the turns of both trajectories in one tree, those of the chosen one
            first.
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
        `ValueError`: If nothing is trained, or some conversations cannot be; the error names all of these.

    Example:

    ```python
    report = verify(model, tokenizer, dataset, max_rows=4)
    assert report.ok, report
    ```
    """
    rows = read_samples(conversations, tokenizer, tools=tools, chat_template=chat_template, max_rows=max_rows)
    return verify_samples(model, rows, max_tokens=max_tokens, load_images=image_loader_of(tokenizer))


def read_samples(
    conversations: Iterable[object],
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    tools: Sequence[Mapping[str, object]] | str | None = None,
    chat_template: str | None = None,
    max_rows: int | None = None,
) -> list[list[Sample]]:
    """Return the samples of each conversation, as the trainers make them at default settings: one at least, in all."""
    given = list(islice(conversations, max_rows))
    if not given:
        raise ValueError("Nothing to compare: `conversations` is empty. Pass at least one conversation.")
    reader = with_chat_template(tokenizer, chat_template)

    def read(index: int, conversation: object) -> list[Sample]:
        example = dict(conversation) if isinstance(conversation, Mapping) else {"messages": conversation}
        if tools is not None and example.get("tools") is None:
            example["tools"] = tools
        return example_to_turns(example, index, reader)

    rows = read_all(given, read, "given")
    if not any(rows):
        raise ValueError("Nothing to compare: all turns have the weight 0, so none is trained.")
    return rows


def verify_samples(
    model: PreTrainedModel,
    given: Sequence[Sequence[Sample]],
    *,
    max_tokens: int | None = None,
    load_images: LoadImages | None = None,
) -> VerifyReport:
    """Do what [`verify`] does with the samples of each conversation; those with images need `load_images`."""
    rows = {index: _first(samples, max_tokens) for index, samples in enumerate(given) if samples}
    if all(sample.image_features is None for samples in rows.values() for sample in samples):
        load_images = None
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    with (
        tqdm(total=sum(2 * len(samples) + 3 for samples in rows.values()), desc="Verifying", unit=" passes") as bar,
        left_as_found(model) as attention,
        reading_images(model, load_images) as images,
        ForcedFloat64() if dtype is torch.float64 else nullcontext(),
    ):
        compared = tuple(
            _compare(model, index, samples, dtype, attention, images, bar.update) for index, samples in rows.items()
        )
        with on_trees(model, attention):
            tree = PrefixTree.from_samples(next(iter(rows.values())))
            check = check_tree(model, make_batch(tree, get_device(model), images), collator=collator_of(images))
    turns_left_out = sum(map(len, given)) - sum(map(len, rows.values()))
    name = str(dtype).removeprefix("torch.")
    return VerifyReport(compared, check, name, turns_left_out, rows_left_out=len(given) - len(rows))


def _first(samples: Sequence[Sample], max_tokens: int | None) -> Sequence[Sample]:
    """Return the first samples that fit in `max_tokens` together, at least one."""
    if max_tokens is None:
        return samples
    return samples[: max(int((np.cumsum(list(map(len, samples))) <= max_tokens).sum()), 1)]


def _compare(
    model: PreTrainedModel,
    index: int,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    tree_attention: str | None,
    images: RowImages,
    on_pass: Callable[[], object],
) -> RowComparison:
    # Both ways run once before they are timed: kernels are compiled, tuned and cached by shape.
    with weights_moved_by_one_rounding(model):
        moved = npass_loss_and_gradients(model, samples, load_images=images.load, on_pass=on_pass)
    npass = npass_loss_and_gradients(model, samples, load_images=images.load, on_pass=on_pass)
    with on_trees(model, tree_attention):
        single_pass_loss_and_gradients(model, samples, images)
        on_pass()
        single_pass = single_pass_loss_and_gradients(model, samples, images)
        on_pass()
        leak = leak_probe(model, samples, images=images)
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
    for sample, a, b in zip(samples, npass.token_losses, single_pass.token_losses, strict=True):
        weights = torch.from_numpy(sample.loss_weights[np.flatnonzero(sample.loss_weights)])
        turns.append(
            TurnComparison(
                row=index,
                turn=sample.turn_index + 1,
                message_index=sample.message_index,
                num_tokens=len(weights),
                npass_loss=float((a * weights).sum() / weights.sum()),
                single_pass_loss=float((b * weights).sum() / weights.sum()),
                error=_largest(a - b),
                allowed=allowed,
            )
        )
    return tuple(turns)


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


# The model: borrowed for the comparison, and given back as it was ----------------------------------------------------


@contextmanager
def left_as_found(model: PreTrainedModel) -> Iterator[str | None]:
    """Put the model on stock layers in evaluation mode; yield the tree attention it came with, if any."""
    base = without_adapters(model)
    attention = get_text_config(base)._attn_implementation
    was_on_trees = attention.startswith("tree_") or any(map(runs_on_trees, base.modules()))
    devices = [get_device(model)] if get_device(model).type == "cuda" else []
    if was_on_trees:
        disable_tree(base, "sdpa" if base._supports_sdpa else "eager")
    try:
        with in_evaluation_mode(model), torch.random.fork_rng(devices), torch.enable_grad():
            yield attention if was_on_trees else None
    finally:
        if was_on_trees:
            enable_tree(base)
            _set_attention(base, attention)


@contextmanager
def on_trees(model: PreTrainedModel, tree_attention: str | None) -> Iterator[None]:
    """Run a model on trees, with the tree attention that it came with, if any; then on stock layers again."""
    base = without_adapters(model)
    before = enable_tree(base)
    try:
        if tree_attention is not None:
            _set_attention(base, tree_attention)
        yield
    finally:
        disable_tree(base, before)


def _set_attention(base: PreTrainedModel, implementation: str) -> None:
    if takes_attention_from_outside(base):  # models with recurrent layers only cannot
        set_text_attention(base, implementation)


@contextmanager
def reading_images(model: PreTrainedModel, load_images: LoadImages | None) -> Iterator[RowImages]:
    """Make the model read images on trees, if there are images to load; yield how."""
    base = without_adapters(model)
    if load_images is None:
        yield RowImages()
        return
    module: Any = image_module(base)
    before = vars(module).get("get_image_features")  # of a model that reads them already
    reader = ImageReader.enable(base)
    try:
        yield RowImages(reader, load_images)
    finally:
        if before is None:
            del module.get_image_features
        else:
            module.get_image_features = before


@contextmanager
def weights_moved_by_one_rounding(model: nn.Module) -> Iterator[None]:
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


class ForcedFloat64(TorchFunctionMode):
    """
    Context manager that turns every request for float32 into float64, for a model after `model.double()`.

    In transformers, RMSNorm, rotary embeddings, softmax and routers ask for float32 by name and round to it. Autograd
    runs the backward pass outside the context, so a checkpointed function must enter it itself to be recomputed.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()

        def widen(value: object) -> object:
            return torch.float64 if value is torch.float32 else value

        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})
