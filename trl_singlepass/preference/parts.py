"""How many parts (rows, or waves of rows) a batch of pairs runs in, and what does not work with several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, logging
from trl import DPOConfig

from ..data.collator import Batch
from ..engine.enable import without_adapters
from ..engine.model_call import refuse_own_calls
from ..recurrent.introspection import path_dependent_layers
from ..training.refusals import check_parts
from ..training.sharding import stop_prefetching
from ..training.situation import Situation
from ..training.wave_budget import wave_tokens_that_fit
from ..trees.rows import TreePlan
from ..waves import WavePlan
from ..waves.engines import get_engine
from ..waves.loss import RouterRecorder
from .parts_model import PairModelInParts


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)


class BatchParts:
    """
    Decides how each batch runs: at once, or in parts.

    Takes the policy with trees enabled; `has_router_loss` says whether the load-balancing loss of a mixture of experts
    is trained. A setting, a model or an engine that does not work with parts raises `ValueError`.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, args: DPOConfig, accelerator: Accelerator, *, has_router_loss: bool
    ) -> None:
        self._args, self._accelerator = args, accelerator
        self._model, self._recorder, self._is_compared = model, None, False
        self._is_bounded = args.max_row_tokens is not None or args.wave_tokens is not None
        if self._is_bounded:
            stop_prefetching(accelerator)
            check_parts(Situation(args, model, accelerator))
            refuse_own_calls(without_adapters(model), "max_row_tokens" if args.wave_tokens is None else "wave_tokens")
            self._recorder = RouterRecorder(without_adapters(model)) if has_router_loss else None
        # Models take a lone token for a step of generation, and drop the mask that carries the tree to recomputation.
        self._is_hybrid = bool(path_dependent_layers(without_adapters(model)))
        self._wave_tokens: int | None = None if args.wave_tokens == "auto" else args.wave_tokens

    def plan(self, row: TreePlan) -> WavePlan:
        """Return the waves of a row. None is kept: all run forward first, and what they hand on is stored by then."""
        if self._args.wave_tokens is None:
            return WavePlan.from_tree_plan(row, row.length)
        if self._wave_tokens is None:
            self._wave_tokens, reason = wave_tokens_that_fit(self._model, self._args)
            logger.info(f"wave_tokens='auto' is {self._wave_tokens}: {reason}.")
        return WavePlan.from_tree_plan(
            row, self._wave_tokens, keep_history=False, allow_single_tokens=not self._is_hybrid
        )

    def count(self, rows: Sequence[Batch]) -> int:
        """Return the largest number of parts that a rank has in this batch; every rank must call it."""
        if not self._is_bounded:
            return 1
        own = self.count_own(rows)
        if self._accelerator.num_processes == 1:
            return own
        everyone = self._accelerator.gather(torch.tensor([own], device=self._accelerator.device))
        return int(everyone.max())

    def count_own(self, rows: Sequence[Batch]) -> int:
        """Return the number of parts that this rank has in a batch."""
        return sum(len(self.plan(row["tree"].plan).waves) for row in rows)

    def model_for(
        self, rows: Sequence[Batch], num_parts: int, model: nn.Module, *, divisor: int = 1
    ) -> PairModelInParts:
        """
        Return the model that runs a batch of several parts.

        `num_parts` is what [`count`] returned for the rows; `divisor` is what the Trainer divides its loss by.
        """
        return PairModelInParts(
            engine=get_engine(model, self._accelerator, 1 / divisor),
            plans=[self.plan(row["tree"].plan) for row in rows],
            num_parts=num_parts,
            offload=self._args.offload_kv,
            recorder=self._recorder,
            compare=None if self._is_compared else self._compare,
        )

    def _compare(self, first: torch.Tensor, again: torch.Tensor) -> None:
        """Check, in the first step of a run, that a part computes the same twice."""
        self._is_compared = True
        error, size = float((first - again).abs().sum()), float(first.abs().sum())
        if error > 1e-3 * size:
            raise RuntimeError(
                f"A part of a batch has other log-probabilities when it runs again: they differ by {error:.3g}, of "
                f"{size:.3g}, so that its gradients would be those of another loss. A layer draws random numbers or "
                "changes its state. Turn that off, or let a batch run at once: max_row_tokens=None, wave_tokens=None."
            )
