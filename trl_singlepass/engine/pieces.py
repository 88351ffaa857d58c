"""How the rows of each batch run: at once, or in pieces that fit into memory (`wave_tokens`, `max_row_tokens`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, logging

from ..attention.row_group import RowGroup
from ..data.collator import Batch
from ..images.reading import images_see_themselves
from ..recurrent.introspection import path_dependent_layers
from ..trees.rows import TreePlan
from .enable import without_adapters
from .gradient_scale import get_gradient_scale
from .model_call import refuse_own_calls
from .router_loss import RouterRecorder
from .row_runner import PieceLoss, RowRunner
from .wave_budget import on_shared_rows, tokens_that_hide_launches, wave_tokens_that_fit
from .waves import WavePlan
from .wrapped_model import SHARDED, wrapped_model


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)


class Pieces:
    """
    Decides how the rows of a trainer run.

    Takes a model with trees enabled. `setting` is the one that bounds memory, `None` if there is none; `knows_loss`
    says whether each piece knows its part of the loss before the others have run, `has_router_loss` whether the
    load-balancing loss of a mixture of experts is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        accelerator: Accelerator,
        *,
        setting: str | None,
        knows_loss: bool,
        has_router_loss: bool,
    ) -> None:
        self._model, self._args, self._accelerator = model, args, accelerator
        self._base, self.setting, self._knows_loss = without_adapters(model), setting, knows_loss
        self._shares_rows = getattr(accelerator.parallelism_config, "sp_size", 1) > 1
        runs_in_pieces = setting is not None or self._shares_rows
        self._recorder = RouterRecorder(self._base) if has_router_loss and runs_in_pieces else None
        if runs_in_pieces:
            refuse_own_calls(self._base, setting or "sp_size")
        # Models take a lone token for a step of generation, and drop the mask that carries the tree to recomputation.
        self._is_hybrid = bool(path_dependent_layers(self._base))
        self._shows_images_whole = images_see_themselves(self._base)
        self._wave_tokens: int | None = None if args.wave_tokens == "auto" else args.wave_tokens
        self._is_compared = False

    @property
    def wave_tokens(self) -> int | None:
        """Largest number of tokens of a row that have activations at the same time; `None` if rows run whole."""
        if self._wave_tokens is None and self._args.wave_tokens is not None:
            tokens, reason = wave_tokens_that_fit(self._model, self._args)
            self._wave_tokens = on_shared_rows(tokens, self._accelerator, divides_layers=not self._is_hybrid)
            logger.info(f"wave_tokens='auto' is {self._wave_tokens}: {reason}.")
            if self._wave_tokens < self._smallest_wave:
                logger.warning(
                    f"wave_tokens='auto' is {self._wave_tokens}, and below about {self._smallest_wave} tokens a fast "
                    "GPU computes a wave of this model in less time than the host takes to launch it, and waits. More "
                    "tokens fit with gradient_checkpointing=True, offload_kv=True or more GPUs."
                )
        return self._wave_tokens

    @cached_property
    def _smallest_wave(self) -> int:
        """Number of tokens from which on a wave keeps the device busy."""
        return 1 if self._args.device.type == "cpu" else tokens_that_hide_launches(self._base)

    def plan(self, row: TreePlan) -> WavePlan:
        """Return the waves of a row: one, if it runs whole."""
        # History can wait with its activations if nothing has to run forward before: neither for a loss that reads all
        # pieces (of pairs, of a mixture's load), nor because the ranks of a sharded model make the same calls.
        is_sharded = self._accelerator.distributed_type in SHARDED
        return WavePlan.from_tree_plan(
            row,
            self.wave_tokens or row.length,
            keep_history=self._knows_loss and self._recorder is None and not is_sharded,
            smallest_wave=self._smallest_wave,
            allow_single_tokens=not self._is_hybrid,
            cut_images=not self._shows_images_whole,
        )

    def runner(
        self,
        model: nn.Module,
        rows: Sequence[Batch],
        plans: Sequence[WavePlan] | None = None,
        *,
        divisor: int = 1,
        loss: PieceLoss | None = None,
        is_own_loss: bool = False,
        trains: bool = True,
        group: RowGroup | None = None,
    ) -> RowRunner | None:
        """
        Return what runs the rows of a batch in place of a model, `None` if they run at once.

        `model` is as the Trainer wrapped it, `plans` are those of the rows, if they are known, and `divisor` is what
        the Trainer divides its loss by. `loss` is what each piece contributes, if it is known; a loss of the user's
        own gets log-probabilities, which pieces alone return, be it one. `trains` says whether a backward follows;
        `group` are the ranks that share the rows. Where ranks meet in the loss or in the model, every rank must call.
        """
        if self.setting is None and group is None:
            return None
        scale = 1 / divisor if group is None else 1 / (divisor * get_gradient_scale(model, group.size))
        runner = RowRunner(
            wrapped_model(model, self._accelerator, scale, group),
            rows,
            [self.plan(row["tree"].plan) for row in rows] if plans is None else plans,
            loss=loss,
            is_own_loss=is_own_loss,
            recorder=self._recorder,
            offload=self._args.offload_kv,
            group=group,
            compares=trains and not self._is_compared,
        )
        if runner.most_pieces == 1 and group is None and not is_own_loss:
            return None
        self._is_compared = self._is_compared or trains
        return runner
