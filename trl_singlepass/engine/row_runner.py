"""
Run the rows of a batch piece by piece, with the loss and the gradients of one call, and the memory of one piece.

A piece is a row, or a wave of one. What a loss needs of the model are log-probabilities `log p_i` of targets, so its
gradients are those of `Σ_i f_i · log p_i`, with the factors `f_i = ∂loss / ∂log p_i`: each piece can run forward and
backward by itself, once the factors are known.

- If they are known beforehand (weight ÷ total weight in fine-tuning), each piece runs once, during the call.
- If not (the loss of a pair reads all its turns), all pieces run forward without gradients, the loss is computed from
  what they return, and its derivatives are the factors with which they run again. That costs one more forward.

Either way, all backwards but that of the last piece have run when [`RowRunner.backward`] returns, and the backward of
the loss that it returns is that of the last piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import trl
from transformers.utils import ModelOutput

from ..attention.context import running_on
from ..attention.row_group import RowGroup
from ..data.collator import Batch
from ..data.row_tree import LineView, RowTree
from ..images.reading import TOKEN_TYPES, EncodedImages, showing_images
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Ranges
from .model_call import PER_TOKEN_OUTPUTS, as_tree, in_lines, join_rows, logits_in_lines, row_inputs
from .router_loss import LoadBalancingLoss, RouterRecorder
from .wave_plan import Wave, WavePlan
from .waves import WaveRunner, select
from .wrapped_model import WrappedModel


# Inputs of a row with images that have an entry for each token; the others are its images.
_PER_TOKEN = frozenset({"input_ids", "position_ids", "attention_mask", "shift_labels", *TOKEN_TYPES})
PieceLoss: TypeAlias = Callable[[ModelOutput, int], torch.Tensor]
"""What a piece contributes to the loss, from its outputs and the position of its first token among all tokens."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A loss `Σ f · log p`, or with `is_dft` `Σ f · sg(p) · log p` (arXiv 2508.05629), plus a load-balancing loss."""

    log_probs: torch.Tensor  # (1, num_tokens), float32: the factor of each position's target, over the rows of a batch
    router_loss: float | torch.Tensor = 0.0  # factor of the load-balancing loss
    is_dft: bool = False
    entropy: torch.Tensor | None = None  # (1, num_tokens): the factor of the entropy at each position

    def __call__(self, outputs: ModelOutput, start: int) -> torch.Tensor:
        """Return what a piece contributes, a scalar: a [`PieceLoss`]."""
        terms: torch.Tensor = outputs.log_probs * self.log_probs[:, start : start + outputs.log_probs.shape[1]]
        if self.is_dft:
            terms = terms * outputs.log_probs.exp().detach()
        loss = terms.sum()
        if self.entropy is not None:
            loss = loss + (outputs.entropy * self.entropy[:, start : start + terms.shape[1]]).sum()
        return loss if outputs.aux_loss is None else loss + self.router_loss * outputs.aux_loss


class RowRunner:
    """
    Stands in for a model in the call of a loss, and runs the rows of one batch in pieces.

    `plans` are the waves of rows; a row that runs whole has one. `loss` is what each piece contributes, if that is
    known before all pieces have run; a loss of the user's own reads log-probabilities where TRL passes logits.
    `recorder` gives the router logits of experts whose load-balancing loss is trained. With `compares`, the call and
    the backward of this batch are compared with each other.
    """

    def __init__(
        self,
        model: WrappedModel,
        rows: Sequence[Batch],
        plans: Sequence[WavePlan],
        *,
        loss: PieceLoss | None = None,
        is_own_loss: bool = False,
        recorder: RouterRecorder | None = None,
        offload: bool = False,
        group: RowGroup | None = None,
        compares: bool = False,
    ) -> None:
        self._model, self._batches, self._plans, self._loss = model, rows, plans, loss
        self._is_own_loss, self._recorder, self._offload = is_own_loss, recorder, offload
        self._group, self._compares = group, compares
        self._others: dict[str, Any] = {}  # inputs of a call that are no part of a row
        self._rows: list[_Row] = []  # those that are being trained
        self._leaves: dict[str, torch.Tensor] = {}  # of the graph of a loss that needs all pieces
        self._load_balancing: LoadBalancingLoss | None = None
        self._total: torch.Tensor | float = 0.0
        self._last: torch.Tensor | None = None  # loss of the piece whose backward comes last
        waves = [wave for plan in plans for wave in plan.waves]
        self.num_pieces = len(waves)
        repeated = self.num_pieces if recorder is not None else sum(bool(wave.handed_on) for wave in waves)
        # Where the loss needs all pieces, ranks meet in it; elsewhere only those of a sharded model meet.
        counts = self.num_pieces, repeated, len(rows)
        most = model.largest(*counts) if model.is_sharded or loss is None else list(counts)
        self.most_pieces, _, self._most_rows = most  # of any rank that meets this one
        # Then nothing has to run before it, on any rank.
        self._is_one_piece = loss is not None and self.most_pieces == 1
        missing = (most[0] - counts[0], most[1] - counts[1]) if model.is_sharded else (0, 0)
        self._missing_pieces, self._missing_repeated = missing

    def __call__(
        self,
        *,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        tree: RowTree | LineView | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """
        Run the rows, on inputs for the whole batch.

        With `fused_lm_head`, this returns the outputs of TRL's fused head: `(1, row_length - 1)` for a row, `(N, M)`
        for the lines of a [`LineView`] with `labels` `(N, M + 1)`. Without, it returns `logits`; where gradients are
        computed, the fused head's outputs for a loss of the user's own, or the `loss` of pieces that know theirs.
        """
        self._others = {
            name: value
            for name, value in inputs.items()
            if name not in self._batches[0] and name not in ("completion_mask", "shift_labels")
        }
        if tree is not None:
            tree.receipt.is_given = True
        self._load_balancing = None
        if self._recorder is not None and inputs.get("output_router_logits"):
            sizes = self._recorder.num_experts, self._recorder.experts_per_token
            self._load_balancing = LoadBalancingLoss(*sizes, self._group)
        rows, run = self._new_rows(), self._run if fused_lm_head else self._run_for_logits
        if not torch.is_grad_enabled():
            outputs = self._forward_all(rows, run)
            if self._is_own_loss and not fused_lm_head:
                scored = self._forward_all(self._new_rows(), self._run)
                for name in PER_TOKEN_OUTPUTS:
                    if scored.get(name) is not None:
                        outputs[name] = scored[name]
            return self._laid_out(outputs, tree, labels)
        self._rows = rows
        if self._loss is not None:
            return self._laid_out(self._train_once(self._loss, run), tree, labels)
        with torch.no_grad():
            outputs = self._forward_all(rows, self._run)
        names = [name for name in ("log_probs", "entropy", "aux_loss") if outputs.get(name) is not None]
        self._leaves = {name: outputs[name].requires_grad_() for name in names}
        # Of the leaves, which stay as they are.
        return self._laid_out(_PieceOutputs(**outputs), tree, labels)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """
        Run the backward of all pieces but the last, whose backward is that of the loss that this returns.

        Takes the loss that was computed from what a call in training returned, a scalar, and returns the same loss.
        """
        if self._loss is None:
            gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
                loss, tuple(self._leaves.values()), allow_unused=True
            )
            read = {name: of for name, of in zip(self._leaves, gradients, strict=True) if of is not None}
            log_probs = self._leaves["log_probs"].detach()
            unread = torch.zeros_like(log_probs)
            factors = Factors(read.get("log_probs", unread), read.get("aux_loss", 0.0), entropy=read.get("entropy"))
            again = self._train(factors, self._run)
            if self._compares:
                _check_same_outputs(log_probs, torch.cat([part.log_probs for part in again], dim=1))
        elif self._compares:
            _check_same_loss(float(loss.detach()), float(self._total))
        assert self._last is not None, "a call in training came before"
        return loss.detach() + (self._last - self._last.detach())

    # Passes over all pieces ------------------------------------------------------------------------------------------

    def _forward_all(self, rows: Sequence[_Row], run: _Run) -> ModelOutput:
        """Run all pieces forward, without gradients; return their outputs one after the other."""
        self._pad(rows[0], self._missing_pieces, run)
        parts = []
        for row in rows:
            for wave, outputs in row.waves.forward_all(partial(run, row)):
                self._count(row, wave)
                parts.append(outputs)
            row.encoded = EncodedImages(trains=True)  # if it runs again
        outputs = join_rows(parts)
        outputs["aux_loss"] = None if self._load_balancing is None else self._load_balancing.value()
        return outputs

    def _train_once(self, loss: PieceLoss, run: _Run) -> ModelOutput:
        """Run each piece forward and backward, as its contribution to the loss is known."""
        if self._load_balancing is not None and not self._is_one_piece:
            for row in self._rows:
                for wave, _ in row.waves.forward_all(partial(self._run_layers, row)):
                    self._count(row, wave)
        elif self._model.is_sharded:
            for row in self._rows:
                row.waves.store_history(partial(self._run_layers, row))
        self._pad(self._rows[0], self._missing_repeated, self._run_layers)
        parts = self._train(loss, run)
        if run == self._run_for_logits:
            return _PieceOutputs(loss=torch.as_tensor(self._total))
        outputs = join_rows(parts)
        shares = [part.aux_loss for part in parts if part.aux_loss is not None]
        outputs["aux_loss"] = torch.stack(shares).sum() if shares else None
        return outputs

    def _train(self, loss: PieceLoss, run: _Run) -> list[ModelOutput]:
        """Run each piece forward, and all but the last backward; return their outputs in order, without gradients."""
        self._pad(self._rows[0], self._missing_pieces, run, trains=True)
        parts: dict[int, ModelOutput] = {}
        for row in self._rows:
            forward, layers = partial(run, row), partial(self._run_layers, row)
            for wave, outputs in row.waves.train(forward, layers):
                outputs["aux_loss"] = self._share(row, wave)
                own, is_last = loss(outputs, row.start + wave.start), self._is_last(row, wave)
                self._total = self._total + own.detach()
                names = [name for name in (*PER_TOKEN_OUTPUTS, "aux_loss") if outputs.get(name) is not None]
                parts[row.start + wave.start] = type(outputs)(**{name: outputs[name].detach() for name in names})
                if not is_last:
                    self._model.backward(own)
                    continue
                self._last = own
                if wave.is_kept:
                    self._model.reduce_in_next_backward(own)
        return [parts[start] for start in sorted(parts)]

    def _pad(self, row: _Row, number: int, run: _Run, *, trains: bool = False) -> None:
        """Run the first tokens again, without effect: the ranks of a sharded model meet inside it."""
        if number == 0:
            return
        is_row = self._most_rows > 1 and row.images is not None  # a piece is a row, and runs the encoder
        tokens, tree = (row.whole, row.waves.tree) if is_row else row.waves.first_tokens()
        wave = row.waves.last if is_row else Wave(0, tokens[-1][1], ())
        for _ in range(number):
            if is_row:
                row = self._new_rows()[0]
                row.encoded.trains = trains
            with torch.set_grad_enabled(trains), running_on(tree):
                outputs = run(row, wave, tokens)
            if not trains:
                continue
            per_token = outputs.get("log_probs", outputs.get("logits"))
            loss = per_token.sum()
            if self._load_balancing is not None:  # routers have the gradients that they have in a piece
                loss = loss + torch.stack([logits.sum() for logits in self._router_logits()]).sum()
            self._model.backward(0 * loss)

    # One piece -------------------------------------------------------------------------------------------------------

    def _run(self, row: _Row, wave: Wave, tokens: Ranges) -> ModelOutput:
        """Run TRL's fused head on some tokens."""
        return self._call(row, wave, tokens, fused_lm_head=True)

    def _run_for_logits(self, row: _Row, wave: Wave, tokens: Ranges) -> ModelOutput:
        return self._call(row, wave, tokens)

    def _run_layers(self, row: _Row, wave: Wave, tokens: Ranges) -> ModelOutput:
        """Run the layers for what they store, and the LM head on one token only."""
        # By its index: at a number, Gemma 4 also cuts what its last layers read, and they would store one token.
        first = row.multiplicity(wave).new_zeros(1, dtype=torch.long)
        return self._call(row, wave, tokens, logits_to_keep=first)

    def _call(self, row: _Row, wave: Wave, tokens: Ranges, **options: Any) -> ModelOutput:
        outputs: ModelOutput
        inputs = {**row.select(tokens, has_labels="fused_lm_head" in options), **options, **self._others}
        row.encoded.is_last = wave is row.waves.last
        with showing_images(row.images, row.waves.plan.row, tokens, row.encoded):
            if torch.is_grad_enabled() and self._is_last(row, wave):
                outputs = self._model.forward_last(is_kept=wave.is_kept, **inputs)
            else:
                outputs = self._model.forward(**inputs)
        return outputs

    def _is_last(self, row: _Row, wave: Wave) -> bool:
        """Return whether the backward of a wave comes last."""
        return row is self._rows[-1] and wave is row.waves.last

    def _count(self, row: _Row, wave: Wave) -> None:
        """Count where a piece sends its tokens, for the load-balancing loss of the batch."""
        if self._load_balancing is not None:
            self._load_balancing.count(self._router_logits(), row.multiplicity(wave))

    def _share(self, row: _Row, wave: Wave) -> torch.Tensor | None:
        """Return what a piece contributes to the load-balancing loss of the batch."""
        if self._load_balancing is None:
            return None
        router_logits, multiplicity = self._router_logits(), row.multiplicity(wave)
        if self._is_one_piece:
            self._load_balancing.count(router_logits, multiplicity)
        return self._load_balancing.share(router_logits, multiplicity)

    def _router_logits(self) -> Sequence[torch.Tensor]:
        assert self._recorder is not None
        return self._recorder.pop()

    # Rows and outputs ------------------------------------------------------------------------------------------------

    def _new_rows(self) -> list[_Row]:
        rows, start = [], 0
        for batch, plan in zip(self._batches, self._plans, strict=True):
            rows.append(_Row(batch, plan, start, self._offload, self._group))
            rows[-1].encoded.trains = self._loss is not None and torch.is_grad_enabled()
            start += plan.row.length
        return rows

    def _laid_out(self, outputs: ModelOutput, tree: object, labels: torch.Tensor | None) -> ModelOutput:
        """Return outputs as the caller expects them: in lines, or aligned with labels shifted by one."""
        if not isinstance(tree, LineView):
            for name in PER_TOKEN_OUTPUTS:
                if outputs.get(name) is not None:
                    outputs[name] = outputs[name][:, :-1]  # the last position has no target
            return outputs
        if outputs.get("logits") is not None:
            outputs["logits"] = logits_in_lines(outputs, tree)
            return outputs
        assert labels is not None, "the fused head scores labels"
        return in_lines(outputs, tree, is_padding=labels[:, 1:] == IGNORE_INDEX)


class _Row:
    """One row of a batch while it runs; `start` is the position of its first token among the tokens of all rows."""

    def __init__(self, batch: Batch, plan: WavePlan, start: int, offload: bool, group: RowGroup | None) -> None:
        self.images, self.start = batch["tree"].image_features, start
        self.encoded = EncodedImages()
        self.waves = WaveRunner(plan, as_tree(batch["tree"], group), offload)
        self.whole: Ranges = ((0, plan.row.length),)
        self._inputs = row_inputs(batch, has_labels=True)

    def select(self, tokens: Ranges, *, has_labels: bool) -> dict[str, torch.Tensor]:
        """Return the inputs of the model for some tokens of the row, and for all its images."""
        inputs = {name: value for name, value in self._inputs.items() if has_labels or name != "shift_labels"}
        if tokens == self.whole:
            return inputs
        per_token = inputs if self.images is None else _PER_TOKEN
        return {name: select(value, tokens) if name in per_token else value for name, value in inputs.items()}

    def multiplicity(self, wave: Wave) -> torch.Tensor:
        """Return how often N-pass runs each token of a wave, `(1, num_tokens)`: the model's `attention_mask`."""
        return select(self._inputs["attention_mask"], ((wave.start, wave.end),))


_Run: TypeAlias = Callable[[_Row, Wave, Ranges], ModelOutput]
"""Runs the model on some tokens of a wave of a row."""


@dataclass
class _PieceOutputs(ModelOutput):  # type: ignore[misc]
    """The outputs of TRL's fused head for rows in pieces, or the loss of all pieces, detached from the model."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None

    @property
    def logits(self) -> torch.Tensor:
        """There are none."""
        raise ValueError(
            "compute_loss_func reads the logits of the whole row, which a row in waves does not have (wave_tokens). "
            "Read `outputs.log_probs`, of shape (1, row_length - 1) and aligned with labels[:, 1:], or set "
            "wave_tokens=None."
        )


def _check_same_loss(expected: float, pieces: float) -> None:
    if abs(pieces - expected) > 1e-3 * abs(expected):
        raise RuntimeError(
            f"The waves of a row have a loss of {pieces:.6g}, but TRL {trl.__version__} computes {expected:.6g}: the "
            "loss whose gradients waves compute is no longer TRL's. Set wave_tokens=None."
        )


def _check_same_outputs(first: torch.Tensor, again: torch.Tensor) -> None:
    error, size = float((first - again).abs().sum()), float(first.abs().sum())
    if error > 1e-3 * size:
        raise RuntimeError(
            f"A piece of a batch has other log-probabilities when it runs again: they differ by {error:.3g}, of "
            f"{size:.3g}, so that its gradients would be those of another loss. A layer draws random numbers or "
            "changes its state. Turn that off, or let a batch run at once: max_row_tokens=None, wave_tokens=None."
        )
