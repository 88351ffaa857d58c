"""A model while it is checked: run on a small row as a tree, and on the samples of the row, in a few ways."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ...attention.context import running_on
from ...attention.row_group import RowGroup
from ...data.collator import Batch, DataCollatorForSinglePass, LoadImages, pad_batch
from ...images.reading import TOKEN_TYPES
from ...recurrent.decoder import in_evaluation_mode
from ...trees.image_features import shown_images
from ...trees.sample import Sample
from ..borrowed_state import are_zero3, captured_embeddings, in_training_mode, zeros_filled
from ..enable import UnsupportedModelError, without_adapters
from ..model_call import as_tree
from .row import CheckRow


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Differences up to this many rounding errors need no closer look: right models in float32 have at most 7.
UNSUSPICIOUS = 32.0
# Right models in half precision differ by at most 4.3 times the noise of the separate samples.
NOISE_FACTOR = 6.0
HALF = 1e-4  # rounding errors of half precision are larger, those of float32 smaller


class TreeCheckError(UnsupportedModelError):
    """A model that computes something else on a tree than on separate samples."""


class CheckedModel:
    """Runs a model, as an engine wrapped it, on a row of T tokens and N samples of S tokens (V: vocabulary)."""

    def __init__(self, model: nn.Module, collator: DataCollatorForSinglePass, group: RowGroup | None = None) -> None:
        self.module: Any = unwrapped(model)
        self.base = without_adapters(self.module)
        self.collator, self.group = collator, group
        # By DeepSpeed, which reduces gradients in hooks of its own, or FSDP2, which frees parameters after a backward.
        self.is_sharded = type(model).__name__ == "DeepSpeedEngine" or any(
            isinstance(module, FSDPModule) for module in model.modules()
        )
        self.gives_gradients = group is None and not are_zero3(model.parameters())

    def rounding_error(self, precision: torch.dtype | None = None) -> float:
        """Return the largest relative rounding error of what the model computes, in `precision` if that is given."""
        dtypes = {parameter.dtype for parameter in self.base.parameters() if parameter.dtype.is_floating_point}
        # Models compute norms and rotations in float32 even where they are in float64.
        dtypes |= {precision or torch.float32, torch.float32}
        # Products of float32, which TF32 and bfloat16 may stand in for.
        products = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
        is_tf32 = get_device(self.base).type == "cuda" and torch.backends.cudnn.allow_tf32
        return max(*(torch.finfo(dtype).eps for dtype in dtypes), products, 2.0**-10 if is_tf32 else 0.0)

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Say what the model was run on, where its own code or ours stops."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise TreeCheckError(
                f"{type(self.base).__name__} does not run on {what} of this data: {reason} Nothing was trained."
            ) from error

    # Ways to run the row ---------------------------------------------------------------------------------------------

    def tree_logits(self, row: CheckRow, changes: Tensor | None = None) -> Tensor:
        """Return the outputs of a row as a tree, `(T, V)`; with relative changes of its embeddings, `(T,)`."""
        changes = None if changes is None else changes[None]
        batch: Batch = self.collator([row.row.columns()])
        device = get_device(self.base)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.group is None:
            inputs = send_to_device(inputs | {"tree": batch["tree"].handled()}, device)
            with self.embeddings_changed(changes):
                logits: Tensor = self.module(**inputs, use_cache=False).logits[0]
            return logits[: len(row.row)].float()
        changes = None if changes is None else self.group.pad_and_part(changes)
        length = self.group.padded_length(len(row.row))
        batch = send_to_device(pad_batch(batch, length, self.collator.pad_token_id), device)
        names = ("input_ids", "position_ids", "attention_mask")  # rows with images are not shared
        with running_on(as_tree(batch["tree"], self.group)), self.embeddings_changed(changes):
            own = self.module(**{name: self.group.part(batch[name]) for name in names}, use_cache=False).logits
        return self.group.gather(own)[0, : len(row.row)].float()

    def sample_logits(self, row: CheckRow, changes: Tensor | None = None) -> Tensor:
        """Return the outputs of the separate samples, `(N, S, V)`: side by side in a batch, with images one by one."""
        one_by_one = row.row.image_features is not None
        outputs = []
        for chosen in [[i] for i in range(len(row.paths))] if one_by_one else [list(range(len(row.paths)))]:
            samples = [row.samples[i] for i in chosen]
            inputs = sample_inputs(self.base, samples, self.collator.load_images)
            with self.embeddings_changed(None if changes is None else changes[torch.as_tensor(row.paths[chosen])]):
                outputs.append(self.module(**inputs, use_cache=False).logits.float())
        return torch.cat(outputs)

    def padded_logits(self, row: CheckRow, padding: int = 7) -> Tensor:
        """Return the outputs of one of the samples alone, padded, `(S, V)`."""
        sample = row.samples[1]
        inputs = sample_inputs(self.base, [sample], self.collator.load_images)
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        shape = inputs["input_ids"].shape
        padded = {
            name: F.pad(value, (0, padding)) if value.shape == shape else value for name, value in inputs.items()
        }
        logits: Tensor = self.module(**padded, use_cache=False).logits[0, : len(sample)]
        return logits.float()

    def tree_with_leak(self, row: CheckRow) -> tuple[Tensor, float | None]:
        """Return the outputs of a row, and the largest gradient of a probe with respect to a foreign token."""
        if not self.gives_gradients:
            with torch.no_grad():
                return self.tree_logits(row), None
        with captured_embeddings(self.module) as embeddings, torch.enable_grad():
            logits = self.tree_logits(row)
            # The last that are of tokens, not of codes that stand for images; X-LoRA runs the model twice.
            length = -(-len(row.row) // (multiple := self.collator.pad_to_multiple_of or 1)) * multiple
            of_row = next(x for x in reversed(embeddings) if x.shape[-2] == length)
            effect = effect_of_tokens(logits[torch.as_tensor(row.probes, device=logits.device)], of_row)
        return logits.detach(), float(effect[: len(row.row)][row.foreign].max())

    # The state of the model ------------------------------------------------------------------------------------------

    @contextmanager
    def prepared(self, *, trains: bool = False) -> Iterator[None]:
        """Put the model in the state in which it is checked; it is left as it was, the random state too."""
        device = get_device(self.base)
        with (
            in_training_mode(self.module) if trains else in_evaluation_mode(self.module),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),  # compiling modules for a row of this size takes minutes
            zeros_filled(self.module),
        ):
            yield

    @contextmanager
    def embeddings_changed(self, changes: Tensor | None) -> Iterator[None]:
        """
        Change what the embedding layer returns, by a relative change for each token, `(batch, length)`.

        It increases some channels and decreases the others: a norm would undo a change of all of them.
        """
        if changes is None:
            yield
            return

        def change(module: nn.Module, args: object, output: Tensor) -> Tensor:
            if output.shape[:-1] != changes.shape:  # of codes that stand for images
                return output
            factors = 1 + changes[..., None] * random_signs(output.shape[-1])
            return (output.double() * factors.to(output.device)).to(output.dtype)

        handle = self.base.get_input_embeddings().register_forward_hook(change)
        try:
            yield
        finally:
            handle.remove()


def random_signs(length: int) -> Tensor:
    """Return 1 or -1 for each of so many, drawn at random and always the same, `(length,)`, float64."""
    return torch.randint(0, 2, (length,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def unwrapped(model: Any) -> Any:
    """Return the model inside of wrappers that only reduce gradients or compile: DDP, DeepSpeed, `torch.compile`."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module
        else:
            return model


def effect_of_tokens(outputs: Tensor, embeddings: Tensor) -> np.ndarray[Any, Any]:
    """Return the largest absolute gradient of outputs, `(…, V)`, with respect to each token, `(T,)`, float64."""
    direction = torch.cos(torch.arange(outputs.shape[-1], device=outputs.device)).to(outputs.dtype)
    (gradient,) = torch.autograd.grad((outputs @ direction).sum(), embeddings)
    effect: np.ndarray[Any, Any] = gradient.reshape(-1, gradient.shape[-1]).abs().amax(-1).double().cpu().numpy()
    return effect


# Separate samples as a model reads them without a tree ------------------------------------------------------------


def get_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, where inputs go."""
    return next(model.parameters()).device


def sample_inputs(
    model: PreTrainedModel, samples: Sequence[Sample], load_images: LoadImages | None
) -> dict[str, torch.Tensor]:
    """Return the inputs of an ordinary forward over samples side by side, padded to the longest."""
    device = get_device(model)

    def padded(arrays: Iterable[NDArray[np.int64]]) -> torch.Tensor:
        return pad_sequence([torch.tensor(array, device=device) for array in arrays], batch_first=True)

    inputs = {"input_ids": padded(sample.token_ids for sample in samples)}
    if len(samples) > 1:
        inputs["attention_mask"] = padded(np.ones_like(sample.token_ids) for sample in samples)
    if all(sample.image_features is None for sample in samples):
        return inputs
    inputs["attention_mask"] = padded(np.ones_like(sample.token_ids) for sample in samples)
    # A sample of text alone stands beside those with images where all share a batch (`_auxiliary_loss`).
    is_image = padded(
        np.zeros_like(sample.token_ids) if own is None else (own >= 0).astype(np.int64)
        for sample in samples
        for own in [sample.image_features]
    )
    taken = inspect.signature(model.forward).parameters
    inputs |= {name: is_image for name in TOKEN_TYPES if name in taken}
    shown = [image for sample in samples for image in shown_images(sample.image_features, sample.images)]
    if shown:
        assert load_images is not None, "samples with images need a loader"
        inputs |= {name: value.to(device) for name, value in load_images(shown).items()}
    return inputs
