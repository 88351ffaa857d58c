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

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.collator import Batch
from ...trees.prefix_tree import IGNORE_INDEX, PrefixTree, sample_paths
from ...trees.rows import Row
from ...trees.sample import Sample
from ..model_call import has_fused_head, row_inputs
from .checked_model import HALF, NOISE_FACTOR, UNSUSPICIOUS, CheckedModel, get_device, random_signs, sample_inputs


_FEWEST = 64  # tokens worth a run
_SIDE = 4  # signs on each side of a gradient
# Gradients below this part of what is usual are noise: those of what a softmax takes out again.
_LEAST_GRADIENT = 1e-3
_MOST_NOISE = 1e4  # rounding errors


def samples_of(batch: Batch) -> list[Sample]:
    """Return the samples of a row, shortest first; each target is trained by the shortest that predicts it."""
    tree, ids = batch["tree"], batch["input_ids"][0].cpu().numpy()
    labels, passing = batch["labels"][0].cpu().numpy(), batch["attention_mask"][0].cpu().numpy()
    ending = passing.copy()  # a sample ends where more come in than go on
    for run in tree.plan.runs:
        ending[run.start : run.end - 1] -= passing[run.start + 1 : run.end]
        if run.prefix:
            ending[run.prefix[-1][1] - 1] -= passing[run.start]
    paths = [
        run.path_positions[: len(run.path_positions) - (run.end - 1 - end)]
        for run in tree.plan.runs
        for end in (run.start + np.flatnonzero(ending[run.start : run.end] > 0)).tolist()
    ]
    features = None if tree.image_features is None else tree.image_features[0].cpu().numpy()
    is_free, samples = labels != IGNORE_INDEX, []
    for path in sorted(paths, key=len):
        targets = path[:-1] + 1  # labels are rolled
        trained = is_free[targets] & (labels[targets] == ids[path[1:]])
        is_free[targets[trained]] = False
        of_path = None if features is None else features[path]
        samples.append(Sample(ids[path], np.r_[0.0, trained], 1, image_features=of_path, images=tree.images))
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
        # DeepSpeed reduces gradients in hooks of its own, and FSDP2 frees parameters after one backward.
        self.with_gradients = model.gives_gradients and not model.is_sharded

    def run(self, samples: Sequence[Sample], seconds: float, per_token: float) -> OwnRowsReport | None:
        """
        Measure the longest samples for which the time is enough; `None` if it is too short for any.

        Takes a guess of the seconds that a token takes in a forward. Long rows follow once a short one has shown it.
        """
        longest, report = max(map(len, samples), default=0), None
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

        In half precision, and where a difference is larger than rounding explains at once, all runs again with
        embeddings moved by one rounding: noise is by how much the samples change, and what differs is what does in
        both measurements.
        """
        tree = PrefixTree.from_samples(samples)
        batch = send_to_device(self.model.collator([Row.from_tree(tree).columns()]), get_device(self.model.base))
        paths = sample_paths(tree, samples)
        measured = self._both(samples, batch, paths, None)
        verdict = self._verdict(*measured, None)
        if verdict[0] <= 1 and not self.is_half:
            return verdict
        changes = self.epsilon / 2 * random_signs(batch["input_ids"].shape[1])
        return self._verdict(*measured, self._both(samples, batch, paths, changes))

    def _both(
        self, samples: Sequence[Sample], batch: Batch, paths: Sequence[NDArray[np.int64]], changes: Tensor | None
    ) -> tuple[_Measured, _Measured]:
        """Return what a row gives as a tree, and as separate samples, with relative changes of embeddings, `(L,)`."""
        with self._sketched() as sketches:
            inputs = row_inputs(batch, has_labels=True) | {"tree": batch["tree"].handled()}
            with self.model.embeddings_changed(None if changes is None else changes[None]):
                of_row = self._log_probs(inputs)
            trained = [
                torch.as_tensor(path[:-1][sample.loss_weights[1:] > 0], device=of_row.device)
                for path, sample in zip(paths, samples, strict=True)
            ]
            on_tree = of_row[torch.cat(trained)]
            self._backward(on_tree)
        tree = _Measured(on_tree.detach().double().cpu(), self._stacked(sketches))
        separate = []
        with self._sketched() as sketches:
            for path, sample in zip(paths, samples, strict=True):
                inputs = sample_inputs(self.model.base, [sample], self.model.collator.load_images)
                is_trained = torch.as_tensor(sample.loss_weights > 0, device=inputs["input_ids"].device)
                labels = inputs["input_ids"].masked_fill(~is_trained, IGNORE_INDEX)
                inputs["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
                with self.model.embeddings_changed(None if changes is None else changes[torch.as_tensor(path)][None]):
                    own = self._log_probs(inputs)[is_trained.roll(-1)]
                self._backward(own)
                separate.append(own.detach().double().cpu())
        return tree, _Measured(torch.cat(separate), self._stacked(sketches))

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

    @contextmanager
    def _sketched(self) -> Iterator[dict[nn.Parameter, Tensor]]:
        """Collect sketches of gradients in place of gradients; what parameters have of them comes back."""
        sketches: dict[nn.Parameter, Tensor] = {}
        if not self.with_gradients:
            with torch.no_grad():
                yield sketches
            return

        def take(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            own = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            sketches[parameter] = sketches.get(parameter, 0) + _sketch(own)
            parameter.grad = None

        trained = [parameter for parameter in self.model.base.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in trained]
        handles = [parameter.register_post_accumulate_grad_hook(take) for parameter in trained]
        try:
            for parameter in trained:
                parameter.grad = None
            with torch.enable_grad():
                yield sketches
        finally:
            for handle in handles:
                handle.remove()
            for parameter, grad in zip(trained, before, strict=True):
                parameter.grad = grad

    def _stacked(self, sketches: dict[nn.Parameter, Tensor]) -> Tensor:
        trained = [parameter for parameter in self.model.base.parameters() if parameter.requires_grad]
        zero = torch.zeros(_SIDE**2, dtype=torch.float64)
        return torch.stack(
            [zero, *(sketches[parameter].cpu() if parameter in sketches else zero for parameter in trained)]
        )[1:]

    def _verdict(
        self, tree: _Measured, separate: _Measured, moved: tuple[_Measured, _Measured] | None
    ) -> tuple[float, float, str | None]:
        errors, noise = _compared(tree.log_probs, separate.log_probs, moved and [x.log_probs for x in moved])
        size = max(float(separate.log_probs.norm()), 1e-30)
        # What acts in one of two measurements makes noise as well.
        least, most = 0.0 if self.is_half else UNSUSPICIOUS * self.epsilon, _MOST_NOISE * self.epsilon
        found = [
            (
                float(errors.norm()) / size,
                max(least, NOISE_FACTOR * min(float(noise.norm()) / size, most)),
                "log-probabilities",
            )
        ]
        if len(separate.sketches):
            sizes = separate.sketches.norm(dim=1)
            sizes = sizes.clamp(min=max(_LEAST_GRADIENT * float(sizes.square().mean().sqrt()), 1e-30))
            errors, noise = _compared(tree.sketches, separate.sketches, moved and [x.sketches for x in moved])
            errors, noise = errors.norm(dim=1), noise.norm(dim=1)
            if self.is_half:  # of all parameters together
                errors, noise, sizes = (x.norm()[None] for x in (errors, noise, sizes))
            usual = (noise / sizes).square().mean().sqrt()
            allowed = NOISE_FACTOR * torch.maximum(noise / sizes, usual).clamp(max=most)
            allowed = allowed.clamp(min=max(least, 1e-30))
            worst = int((errors / sizes / allowed).nan_to_num(nan=torch.inf).argmax())
            names = [name for name, parameter in self.model.base.named_parameters() if parameter.requires_grad]
            what = "gradients" if self.is_half else f"the gradient of {names[worst]}"
            found.append((float(errors[worst] / sizes[worst]), float(allowed[worst]), what))
        ratios = [float(np.nan_to_num(a / max(b, 1e-30), nan=np.inf)) for a, b, _ in found]
        worst = int(np.argmax(ratios))
        return ratios[worst], found[worst][0], found[worst][2] if ratios[worst] > 1 else None


def _compared(on_tree: Tensor, separate: Tensor, moved: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return by how much a tree differs, in both of two measurements if there are two, and by how much samples do."""
    errors = (on_tree - separate).abs()
    if moved is None:
        return errors, torch.zeros_like(errors)
    return torch.minimum(errors, (moved[0] - moved[1]).abs()), moved[1] - separate


def _sketch(gradient: Tensor) -> Tensor:
    """Return 16 random projections of a gradient, float64 on the device of the gradient."""
    rows = gradient.reshape(gradient.shape[0] if gradient.dim() else 1, -1)
    left = random_signs(_SIDE * rows.shape[0]).view(_SIDE, -1).to(rows)
    right = random_signs(_SIDE * rows.shape[1] + 1)[1:].view(-1, _SIDE).to(rows)
    return ((left @ rows) @ right).flatten().double()
