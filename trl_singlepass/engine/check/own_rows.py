"""
The rows of a run, measured as they are trained: in training mode, with gradients, against their separate samples.

The small row shows whether branches are kept apart. What begins at some length, acts in training only or goes wrong in
backward alone shows here: log-probabilities of targets, and for each parameter a sketch of its gradient, `U g V` with
random signs, which differs where the gradient does and takes 16 numbers.

Shape letters: L tokens of a row, S of a sample, P trained parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.collator import Batch
from ...trees.prefix_tree import IGNORE_INDEX, PrefixTree
from ...trees.rows import Row
from ...trees.sample import Sample
from ..model_call import has_fused_head, row_inputs
from .checked_model import HALF, NOISE_FACTOR, UNSUSPICIOUS, CheckedModel, get_device, random_signs, sample_inputs


_FEWEST = 64  # tokens worth a run
_SIDE = 4  # signs on each side of a gradient
# Gradients below this part of what is usual are noise: those of what a softmax takes out again.
_LEAST_GRADIENT = 1e-3
_MOST_NOISE = 1e4  # rounding errors
_OF_GRADIENTS = 16  # times as large errors as of outputs
_OTHER = 1e-2  # relative change of embeddings


def samples_of(batch: Batch) -> list[tuple[Sample, NDArray[np.int64]]]:
    """
    Return the samples of a row and where their tokens are, shortest first.

    Each target is trained by the shortest sample that predicts it.
    """
    tree, ids = batch["tree"], batch["input_ids"][0].cpu().numpy()
    labels, ends = batch["labels"][0].cpu().numpy(), tree.sample_ends
    if ends is None:  # of a row that others have made: a sample ends where nothing follows
        end = tree.subtree_end[0].cpu().numpy()
        ends = np.flatnonzero(end == np.arange(1, len(end) + 1))
    paths = [
        run.path_positions[: len(run.path_positions) - (run.end - 1 - end)]
        for run in tree.plan.runs
        for end in ends[(ends >= run.start) & (ends < run.end)].tolist()
    ]
    features = None if tree.image_features is None else tree.image_features[0].cpu().numpy()
    is_free, samples = labels != IGNORE_INDEX, []
    for path in sorted(paths, key=len):
        targets = path[:-1] + 1  # labels are rolled
        trained = is_free[targets] & (labels[targets] == ids[path[1:]])
        is_free[targets[trained]] = False
        of_path = None if features is None else features[path]
        sample = Sample(ids[path], np.r_[0.0, trained], 1, image_features=of_path, images=tree.images)
        samples.append((sample, path))
    return samples


def that_fit(samples: Sequence[Sample], num_tokens: int) -> list[Sample]:
    """
    Return the longest samples that fit in a number of tokens, as a tree and one by one.

    Where not even one does, its beginning stands for it, forked in the middle.
    """
    longest = sorted((sample for sample in samples if sample.is_trained), key=len, reverse=True)
    chosen: list[Sample] = []
    for sample in longest:
        if 2 * (sum(map(len, chosen)) + len(sample)) <= num_tokens:
            chosen.append(sample)
    if chosen or not longest or num_tokens < _FEWEST or longest[0].image_features is not None:
        return chosen
    length = num_tokens // 4
    ids = longest[0].token_ids[:length]
    other = np.r_[ids[: length // 2], ids[length // 2 :][::-1]]
    return [Sample(each, np.r_[0.0, np.ones(length - 1)], 1) for each in (ids, other)]


@dataclass(frozen=True, slots=True)
class _Measured:
    """Log-probabilities of all targets, `(num_targets,)`, and sketches by parameter, `(P, 16)`; both float64."""

    log_probs: Tensor
    sketches: Tensor


@dataclass(frozen=True, slots=True)
class OwnRowsReport:
    """What was measured on the rows of a run; `str()` of it is a part of a line."""

    num_samples: int
    longest: int  # tokens of the longest sample that was measured
    of: int  # tokens of the longest sample
    difference: float  # relative to N-pass, the worst compared with what rounding explains
    what: str | None  # what differs by more
    seconds: float

    def __str__(self) -> str:
        cut = "" if self.longest == self.of else f" of {self.of}"
        return (
            f"{self.num_samples} own samples of up to {self.longest}{cut} tokens in training mode, with gradients "
            f"({self.difference:.1g}), in {self.seconds:.1f} s"
        )


class OwnRows:
    """Measures a model on samples of its run."""

    def __init__(self, model: CheckedModel, epsilon: float, over_ranks: Callable[..., list[float | None]]) -> None:
        self.model, self.epsilon, self.is_half, self._over_ranks = model, epsilon, epsilon > HALF, over_ranks
        # DeepSpeed reduces gradients in hooks of its own, FSDP2 frees parameters after one backward, and where ranks
        # divide a layer, each has a part.
        is_divided = any(hasattr(parameter, "to_local") for parameter in model.module.parameters())
        self.with_gradients = model.gives_gradients and not model.is_sharded and not is_divided

    def run(self, samples: Sequence[Sample], seconds: float, per_token: float) -> OwnRowsReport | None:
        """
        Measure the longest samples for which the time is enough; `None` if it is too short for any.

        Takes a guess of the seconds that a token takes in a forward. Long rows follow once a short one has shown it.
        """
        longest, report = max(map(len, samples), default=0), None
        # Ranks run the same samples: the slowest decides.
        less, per_token = (float(x or 0.0) for x in self._over_ranks(-seconds, per_token))
        seconds = -less
        num_tokens, spent = int(seconds / per_token / 12), 0.0  # forward and backward, and both again where it differs
        while chosen := that_fit(samples, num_tokens):
            start = time.perf_counter()
            with self.model.prepared(trains=True), self.model.explained("rows"):
                ratio, difference, what = self._measure(chosen)
            ratio, elapsed = (float(x or 0.0) for x in self._over_ranks(ratio, time.perf_counter() - start))
            spent += elapsed
            report = OwnRowsReport(
                len(chosen), max(map(len, chosen)), longest, difference, what or ("" if ratio > 1 else None), spent
            )
            before, num_tokens = num_tokens, int(num_tokens * (seconds - spent) / elapsed / 2)
            if ratio > 1 or num_tokens < 2 * before or len(chosen) == len(samples):
                break
        return report

    def _measure(self, samples: Sequence[Sample]) -> tuple[float, float, str | None]:
        """
        Return the worst difference relative to what is allowed, the difference, and what differs if it is too much.

        In half precision, and where a difference is larger than rounding explains at once, all runs again on other
        embeddings: a unit or an expert that one rounding switches is another one then, and what is wrong stays wrong.
        Noise is by how much the samples change where embeddings are moved by one rounding.
        """
        row = Row.from_tree(PrefixTree.from_samples(samples))
        batch = send_to_device(self.model.collator([row.columns()]), get_device(self.model.base))
        samples, paths = zip(*samples_of(batch), strict=True)  # the collator may take trees apart
        on_tree, separate = self._on_tree(samples, batch, paths), self._separately(samples, paths)
        verdict = self._verdict(on_tree, separate)
        (ratio,) = self._over_ranks(verdict[0])
        if (ratio or 0.0) <= 1 and not self.is_half:
            return verdict
        signs = random_signs(batch["input_ids"].shape[1])
        moved = self._separately(samples, paths, self.epsilon / 2 * signs)
        again = self._on_tree(samples, batch, paths, _OTHER * signs), self._separately(samples, paths, _OTHER * signs)
        return self._verdict(on_tree, separate, moved, again)

    def _on_tree(
        self,
        samples: Sequence[Sample],
        batch: Batch,
        paths: Sequence[NDArray[np.int64]],
        changes: Tensor | None = None,
    ) -> _Measured:
        """Run a row as a tree; `changes`, `(L,)`, are relative changes of embeddings."""
        inputs = row_inputs(batch, has_labels=True) | {"tree": batch["tree"].handled()}
        with self._sketched() as sketches:
            with self.model.embeddings_changed(None if changes is None else changes[None]):
                of_row = self._log_probs(inputs)
            trained = [path[:-1][sample.loss_weights[1:] > 0] for path, sample in zip(paths, samples, strict=True)]
            log_probs = of_row[torch.as_tensor(np.concatenate(trained), device=of_row.device)]
            self._backward(log_probs)
        return _Measured(log_probs.detach().double().cpu(), self._stacked(sketches))

    def _separately(
        self, samples: Sequence[Sample], paths: Sequence[NDArray[np.int64]], changes: Tensor | None = None
    ) -> _Measured:
        """Run samples one by one, with the changes of their tokens in the row."""
        log_probs = []
        with self._sketched() as sketches:
            for path, sample in zip(paths, samples, strict=True):
                inputs = sample_inputs(self.model.base, [sample], self.model.collator.load_images)
                is_trained = torch.as_tensor(sample.loss_weights > 0, device=inputs["input_ids"].device)
                labels = inputs["input_ids"].masked_fill(~is_trained, IGNORE_INDEX)
                inputs["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
                with self.model.embeddings_changed(None if changes is None else changes[torch.as_tensor(path)][None]):
                    own = self._log_probs(inputs)[is_trained.roll(-1)]
                self._backward(own)
                log_probs.append(own.detach().double().cpu())
        return _Measured(torch.cat(log_probs), self._stacked(sketches))

    def _log_probs(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the log-probability of each target, `(L,)`, by TRL's fused head if the run trains with it."""
        labels = inputs["shift_labels"]
        if has_fused_head(self.model.base):
            log_probs: Tensor = self.model.module(**inputs, fused_lm_head=True).log_probs[0]
            return log_probs
        del inputs["shift_labels"]
        logits: Tensor = self.model.module(**inputs, use_cache=False).logits[0]
        return -F.cross_entropy(logits.float(), labels[0], reduction="none", ignore_index=IGNORE_INDEX)

    def _backward(self, log_probs: Tensor) -> None:
        if self.with_gradients and len(log_probs) and log_probs.requires_grad:
            log_probs.sum().backward()  # type: ignore[no-untyped-call]

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        if not self.with_gradients:
            return {}
        return {name: parameter for name, parameter in self.model.base.named_parameters() if parameter.requires_grad}

    @contextmanager
    def _sketched(self) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Collect sketches of gradients in place of gradients; what parameters have of them comes back."""
        sketches: dict[nn.Parameter, Tensor] = {}

        def take(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            sketches[parameter] = sketches.get(parameter, 0) + _sketch(parameter.grad)
            parameter.grad = None

        before = {parameter: parameter.grad for parameter in self._trained.values()}
        handles: list[Any] = [x.register_post_accumulate_grad_hook(take) for x in before]  # type: ignore[no-untyped-call]
        try:
            for parameter in before:
                parameter.grad = None
            with torch.set_grad_enabled(self.with_gradients):
                yield sketches
        finally:
            for handle in handles:
                handle.remove()
            for parameter, grad in before.items():
                parameter.grad = grad

    def _stacked(self, sketches: dict[nn.Parameter, Tensor]) -> Tensor:
        zero = torch.zeros(_SIDE**2, dtype=torch.float64)
        found = [sketches[x].cpu() if x in sketches else zero for x in self._trained.values()]
        return torch.stack(found) if found else zero[None, :0]

    def _verdict(
        self,
        on_tree: _Measured,
        separate: _Measured,
        moved: _Measured | None = None,
        again: tuple[_Measured, _Measured] | None = None,
    ) -> tuple[float, float, str | None]:
        found = []
        for name in ("log_probs", "sketches"):
            tree, samples = getattr(on_tree, name), getattr(separate, name)
            errors, noise = (tree - samples).abs(), torch.zeros_like(samples)
            if moved is not None and again is not None:
                other, others = (getattr(each, name) for each in again)
                errors, noise = torch.minimum(errors, (other - others).abs()), getattr(moved, name) - samples
            is_sketch = name == "sketches"
            if not is_sketch or self.is_half:  # of all together
                tree, samples, errors, noise = (x.flatten()[None] for x in (tree, samples, errors, noise))
            found.append(self._worst(samples.norm(dim=1), errors.norm(dim=1), noise.norm(dim=1), is_sketch=is_sketch))
        ratio, difference, what = max(found)
        return ratio, difference, what if ratio > 1 else None

    def _worst(self, sizes: Tensor, errors: Tensor, noise: Tensor, *, is_sketch: bool) -> tuple[float, float, str]:
        """Return the worst error relative to what is allowed, that error, and its name."""
        sizes = sizes.clamp(min=max(_LEAST_GRADIENT * float(sizes.square().mean().sqrt()), 1e-30))
        errors, noise = errors / sizes, noise / sizes
        # What acts in one of several measurements is no noise.
        noise = torch.maximum(noise, noise.square().mean().sqrt()).clamp(max=_MOST_NOISE * self.epsilon)
        least = 0.0 if self.is_half else (_OF_GRADIENTS if is_sketch else 1) * UNSUSPICIOUS * self.epsilon
        ratios = (errors / (NOISE_FACTOR * noise).clamp(min=max(least, 1e-30))).nan_to_num(nan=torch.inf)
        worst = int(ratios.argmax())
        what = f"the gradient of {list(self._trained)[worst]}" if is_sketch and len(sizes) > 1 else "gradients"
        return float(ratios[worst]), float(errors[worst]), what if is_sketch else "log-probabilities"


def _sketch(gradient: Tensor) -> Tensor:
    """Return 16 random projections of a gradient, float64 on the device of the gradient."""
    rows = gradient.reshape(gradient.shape[0] if gradient.dim() else 1, -1)
    left = random_signs(_SIDE * rows.shape[0]).view(_SIDE, -1).to(rows)
    right = random_signs(_SIDE * rows.shape[1] + 1)[1:].view(-1, _SIDE).to(rows)
    return ((left @ rows) @ right).flatten().double()
