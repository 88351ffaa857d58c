"""
The measured check: a small row, run as a tree and as separate samples, on the model that is about to be trained.

Nothing here knows how layers work. A model, its adapters, its kernels and its engine are right if

- *isolation*: no output of a branch depends on a token that is not its ancestor. The gradient with respect to such a
  token is exactly zero, in every precision. Where an engine gives no such gradient, and for what mixes tokens before
  they are embedded, branches exchange places among other tokens, and must compute what they computed before.
- *equality*: the outputs are those of the separate samples, as far as two ways to run these agree: alone, and padded.

Shape letters: T tokens of the row, N samples of S tokens, V size of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...attention.row_group import RowGroup
from ...data.collator import Batch, DataCollatorForSinglePass
from ...trees.sample import Sample
from ..borrowed_state import adapters_disabled
from ..enable import disable_tree, without_adapters
from ..enable import enable_tree as enable_unmeasured
from ..model_call import expect_layers, takes_trees
from .checked_model import HALF, NOISE_FACTOR, UNSUSPICIOUS, CheckedModel, TreeCheckError, random_signs, unwrapped
from .first_difference import differing_module, mixing_module
from .own_rows import OwnRows, OwnRowsReport
from .row import CheckRow, ShownImage, text_beside_images


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

NEWEST_TRIED = {"transformers": "5.25", "trl": "1.16"}
"""The newest releases with which the tests have passed."""
# The noise of a model is between half a rounding error and this many. Beyond, samples depend on their padding.
MOST_NOISE = 64.0


def enable_tree(model: PreTrainedModel | PeftModel, *, check: bool = True) -> str:
    """
    Make a model run on trees where there is one: `model(**batch)` takes the entry `tree` of a batch.

    Batches without a tree run as before. A small row shows first that the model is exact (see [`check_tree`]).

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model, changed in place. Its `attn_implementation` chooses the attention backend.
        check (`bool`, *optional*, defaults to `True`):
            Whether to measure the model. If not, a warning says that nothing is known.

    Returns:
        `str`: The `attn_implementation` that the model had.

    Raises:
        `UnsupportedModelError`: If no tree can reach the model, or it computes something else on a tree than on
            separate samples; then it is left as it was.
        `ValueError`: If there is no tree attention for its `attn_implementation`, or it is compiled.
        `ImportError`: If the kernel it chose is not installed.
    """
    base = without_adapters(model)
    was_enabled = takes_trees(base)
    before = enable_unmeasured(model)
    if not check:
        logger.warning(
            f"enable_tree(check=False): nothing shows that {type(base).__name__} computes on a tree what it computes "
            "on separate samples. check_tree(model) measures it."
        )
        return before
    report = None
    try:
        report = check_tree(model)
        if not report.ok:
            raise TreeCheckError(refusal(base, report))
    finally:
        if (report is None or not report.ok) and not was_enabled:
            disable_tree(base, before)
    return before


def check_tree(
    model: PreTrainedModel | PeftModel,
    tokenizer_or_row: PreTrainedTokenizerBase | Batch | None = None,
    *,
    collator: DataCollatorForSinglePass | None = None,
) -> TreeCheckReport:
    """
    Measure whether a model computes on a tree what it computes on separate samples.

    The trainers do this before the first step (`self_check`). Call it to hold a model, kernel or engine of your own to
    the same measure. A model on which [`enable_tree`] was not called runs on trees for the time of the check.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model, also inside of a wrapper of DDP, FSDP2 or DeepSpeed. It runs in evaluation mode, and is left as it
            was.
        tokenizer_or_row (`transformers.PreTrainedTokenizerBase` or `Batch`, *optional*):
            Where the tokens of the small row come from: a tokenizer, or a batch of [`DataCollatorForSinglePass`],
            whose images are used as well. By default, from the whole vocabulary of the model.
        collator (`DataCollatorForSinglePass`, *optional*):
            Collator of the batch, if it has images.

    Returns:
        `TreeCheckReport`: `.ok` says whether it does.

    Raises:
        `UnsupportedModelError`: If trees cannot be enabled in the model.
    """
    base = without_adapters(unwrapped(model))
    collator = collator or DataCollatorForSinglePass(pad_token_id=0)
    if isinstance(tokenizer_or_row, Mapping):
        text, shown = tokens_of_batch(dict(tokenizer_or_row))
    else:
        size = base.config.get_text_config().vocab_size
        size = size if tokenizer_or_row is None else min(len(tokenizer_or_row), size)
        spread, special = np.linspace(0, size - 1, 100).astype(np.int64), _special_tokens(base)
        text, shown = spread[~np.isin(spread, special)], ()
    before = None if takes_trees(base) else enable_unmeasured(base)
    try:
        return TreeCheck(model, collator).run(text, shown)
    finally:
        if before is not None:
            disable_tree(base, before)


def _special_tokens(model: PreTrainedModel) -> list[int]:
    """Return the tokens that the configuration names: those of images stand for features that are not there."""
    named = model.config.to_dict().items()
    return [x for name, x in named if name.endswith(("token_id", "token_index")) and isinstance(x, int)]


def tokens_of_batch(batch: Batch) -> tuple[np.ndarray[Any, Any], tuple[ShownImage, ...]]:
    """Return the tokens of the text of a batch along one path of each tree, and up to two images of it."""
    tree, ids = batch["tree"], batch["input_ids"][0].cpu().numpy()
    run = max(tree.plan.runs, key=lambda run: run.depth + run.end - run.start)
    path = run.path_positions
    if tree.image_features is None:
        return ids[path], ()
    features = tree.image_features[0].cpu().numpy()
    text = text_beside_images(ids, features)
    return text, ShownImage.smallest(ids, features, tree.images)


class TreeCheck:
    """Runs the check on one model that takes trees, as an engine wrapped it; under autocast, with its `precision`."""

    def __init__(
        self,
        model: nn.Module,
        collator: DataCollatorForSinglePass,
        group: RowGroup | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self.model = CheckedModel(model, collator, group)
        self.epsilon = self.model.rounding_error(precision)

    def run(self, text: np.ndarray[Any, Any], shown: Sequence[ShownImage] = ()) -> TreeCheckReport:
        """Measure, on tokens of the data, `(num_tokens,)`, int64, and on one or two of its images, if it has any."""
        start = time.perf_counter()
        expect_layers(self.model.base)
        row = CheckRow.from_tokens(text, shown)
        exchanged = CheckRow.from_tokens(text, shown, is_exchanged=True)
        with self.model.prepared():
            measured = self._measure(row, exchanged)
            if not measured.ok:
                where, adapters = self._find_module(row, measured), self._find_adapters(row, exchanged)
                measured = replace(measured, where=where, adapters=adapters)
        seconds = time.perf_counter() - start
        self.seconds_per_token = seconds / (3 * len(row.row))  # the tree, its backward, and the samples
        return replace(measured, seconds=seconds)

    def run_own(self, samples: Sequence[Sample], seconds: float) -> OwnRowsReport | None:
        """Measure samples of the run for some seconds; see [`OwnRows`]."""
        return OwnRows(self.model, self.epsilon, self._over_ranks).run(samples, seconds, self.seconds_per_token)

    def _measure(self, row: CheckRow, exchanged: CheckRow) -> TreeCheckReport:
        with torch.no_grad(), self.model.explained("separate samples"):
            alone = self.model.sample_logits(row)
        with self.model.explained("a tree"):
            tree, leak = self.model.tree_with_leak(row)
        moved = None
        if leak is None:  # no gradients: the branches `a` and `b` in each other's place, among other tokens
            with torch.no_grad():
                again = self.model.tree_logits(exchanged)
            places = [torch.as_tensor(path, device=tree.device) for path in row.exchanged]
            pairs = (places, reversed(places))
            moved = max(float(_errors(again[here], tree[there]).max()) for here, there in zip(*pairs, strict=True))
        paths = torch.as_tensor(row.paths, device=tree.device)
        difference, leak, moved = self._over_ranks(_rms(_errors(tree[paths], alone)), leak, moved)
        assert difference is not None
        is_half = self.epsilon > HALF
        allowed = 0.0 if is_half else UNSUSPICIOUS * self.epsilon
        report = TreeCheckReport(difference, allowed, leak, moved, moved_allowed=allowed)
        if report.ok and not is_half:
            return report
        return self._measure_again(report, row, tree[paths], alone)

    def _measure_again(self, first: TreeCheckReport, row: CheckRow, before: Tensor, alone: Tensor) -> TreeCheckReport:
        """
        Measure with the rounding errors of other runs: both ways again, with embeddings moved by one rounding.

        Routers with two experts at rounding distance pick others then, and what is wrong stays what it was: a token
        differs by the smaller of both differences, noise is what the samples themselves change by, or by padding, and
        systematic what both differences have in common.
        """
        changes = self.epsilon / 2 * random_signs(len(row.row))  # the largest rounding error
        with torch.no_grad():
            tree, rounded = self.model.tree_logits(row, changes), self.model.sample_logits(row, changes)
            padded = _rms(_errors(self.model.padded_logits(row), alone[1]))
        after = tree[torch.as_tensor(row.paths, device=tree.device)]
        cosines = F.cosine_similarity(before - alone, after - rounded, dim=-1)
        errors = _errors(rounded, alone)
        difference, noise, most, systematic = self._over_ranks(
            _rms(torch.minimum(_errors(before, alone), _errors(after, rounded))),
            max(min(padded, MOST_NOISE * self.epsilon), _rms(errors), self.epsilon / 2),
            float(errors.max()),
            float(cosines.mean(1).max()),
        )
        assert difference is not None
        assert noise is not None
        assert most is not None
        return replace(
            first,
            difference=difference,
            noise=noise,
            allowed=max(first.allowed, NOISE_FACTOR * noise),
            systematic=systematic,
            moved_allowed=max(first.moved_allowed, NOISE_FACTOR * most),
        )

    def _find_module(self, row: CheckRow, measured: TreeCheckReport) -> str | None:
        model, found = self.model, None
        # FSDP2 frees the parameters of a layer after one backward through it, and this search needs many.
        if measured.leak and not any(isinstance(module, FSDPModule) for module in model.module.modules()):
            found = mixing_module(model.base, model.tree_logits, row)
        return found or differing_module(model.base, model.tree_logits, model.sample_logits, row, self.epsilon)

    def _find_adapters(self, row: CheckRow, exchanged: CheckRow) -> str | None:
        """Return the configurations of the adapters of a model that is right without them."""
        if not hasattr(self.model.module, "disable_adapter"):
            return None
        with adapters_disabled(self.model.module):
            is_right = self._measure(row, exchanged).ok
        names = {type(config).__name__ for config in self.model.module.peft_config.values()}
        return ", ".join(sorted(names)) if is_right else None

    @staticmethod
    def _over_ranks(*values: float | None) -> list[float | None]:
        """Return the largest of each value over all ranks, so that all of them reach one verdict."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return list(values)
        given: list[list[float | None]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(given, list(values))
        # NaN, which no comparison finds, becomes infinity.
        whole = np.nan_to_num(np.array(given, np.float64), nan=np.inf)
        return [None if value is None else float(most) for value, most in zip(values, whole.max(0), strict=True)]


def refusal(model: nn.Module, report: TreeCheckReport | OwnRowsReport) -> str:
    """Return why a model is not trained."""
    name, where = type(model).__name__, ""
    if isinstance(report, OwnRowsReport):
        what = f"{report.what or 'what another rank measured'} differs by {report.difference:.1e}"
        reason = f"{what} on samples of up to {report.longest} tokens of this data, in training mode"
    else:
        reason = report.reason
        where = f" {report.where}." if report.where else ""
        where += f" Without its adapters ({report.adapters}), it does." if report.adapters else ""
    untried = [
        f"{library} {version(library)} has not been tried with trl-singlepass {version('trl-singlepass')} "
        f"(newest: {newest}); "
        for library, newest in NEWEST_TRIED.items()
        if Version(version(library)).release[:2] > Version(newest).release
    ]
    way_out = "Train it on one sample per turn (N-pass: `to_npass` and TRL's own trainer)"
    if untried:
        way_out += ", or install the newest release that was tried"
    elif isinstance(report, OwnRowsReport) or not report.is_isolated or report.where:
        way_out += ", or take out the layer or adapter that mixes the tokens of a row"
    return (
        f"{''.join(untried)}{name} does not compute on a tree what it computes on separate samples: {reason}.{where} "
        f"Nothing was trained since. {way_out}; check_tree(model) measures it again."
    )


def _errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return the norm of the difference of each token's outputs, relative to the outputs; `(…, V)` → `(…,)`."""
    norm = expected.norm(dim=-1).clamp(min=torch.finfo(expected.dtype).tiny)
    errors: Tensor = (found - expected).norm(dim=-1) / norm
    return errors


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


MOST_SYSTEMATIC = 0.6
"""
Mean cosine along a sample of two differences with other rounding errors. Models that are wrong at every token have
0.95 or more; those that are wrong at a few have less, but differ by more than noise. Right models have up to 0.56
where attention is nearly uniform: all averages over the same number of tokens are rounded alike.
"""


@dataclass(frozen=True, slots=True)
class TreeCheckReport:
    """
    What the measured check found; `str()` of it is one line.

    Args:
        difference (`float`):
            Norm of the difference between the outputs of tree and separate samples, relative to the outputs; where
            noise is measured, what both of two measurements show.
        allowed (`float`):
            Largest difference that rounding explains.
        leak (`float`, *optional*):
            Largest gradient of a branch's output with respect to a token that is not its ancestor; `None` where the
            engine gives no such gradient.
        moved (`float`, *optional*):
            Largest difference between the outputs of a branch and those in another place, among other tokens; only
            where there is no gradient.
        moved_allowed (`float`, *optional*):
            Largest such difference that rounding explains.
        noise (`float`, *optional*):
            Difference between two ways to run the separate samples: alone and padded, or with embeddings that are
            moved by one rounding; only in half precision, or if outputs differ.
        systematic (`float`, *optional*):
            How much two differences with other rounding errors have in common: the mean cosine along a sample, 0 for
            noise and 1 for what is wrong in the same way; where noise is measured.
        seconds (`float`):
            Time that the check took.
        where (`str`, *optional*):
            If it failed: the first module whose outputs differ, and a token at which they do.
        adapters (`str`, *optional*):
            If it failed: the configurations of the adapters without which the model is right.
    """

    difference: float
    allowed: float
    leak: float | None = None
    moved: float | None = None
    moved_allowed: float = 0.0
    noise: float | None = None
    systematic: float | None = None
    seconds: float = 0.0
    where: str | None = None
    adapters: str | None = None

    @property
    def is_isolated(self) -> bool:
        """Whether each branch depends on its ancestors only."""
        return (self.leak is None or self.leak == 0) and (self.moved is None or self.moved <= self.moved_allowed)

    @property
    def is_equal(self) -> bool:
        """Whether outputs are those of separate samples: the more they differ, the less of it may be systematic."""
        if self.systematic is None or self.noise is None:
            return self.difference <= self.allowed
        most = MOST_SYSTEMATIC * self.noise / max(self.difference, self.noise)
        return self.difference <= self.allowed and self.systematic <= most

    @property
    def ok(self) -> bool:
        """Whether the model computes on a tree what it computes on separate samples."""
        return self.is_isolated and self.is_equal

    def __str__(self) -> str:
        verdict = "tree equals separate samples" if self.ok else "tree does NOT equal separate samples"
        noise = "" if self.noise is None else f", noise {self.noise:.1g}"
        return f"{verdict} ({self.difference:.1g}{noise}), in {self.seconds:.1f} s"

    @property
    def reason(self) -> str:
        """What is wrong, as a sentence without its end."""
        parts = []
        if self.leak is not None and self.leak != 0:
            parts.append(f"a branch depends on tokens that are not its ancestors (gradient {self.leak:.1e})")
        if self.moved is not None and not self.moved <= self.moved_allowed:
            parts.append(f"a branch differs by {self.moved:.1e} among other tokens (allowed {self.moved_allowed:.1e})")
        if not self.difference <= self.allowed:
            parts.append(f"outputs differ by {self.difference:.1e} (allowed {self.allowed:.1e})")
        elif not self.is_equal:
            parts.append(f"outputs differ by {self.difference:.1e}, in the same way whenever they are rounded")
        return "; ".join(parts)
