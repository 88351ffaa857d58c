"""
Sequence parallelism (DeepSpeed Ulysses): the ranks of a group share each row, and attention sees all of it.

Each rank runs its part of the row through every layer; around attention, ranks exchange parts of the row for attention
heads. Attention therefore sees whole rows with a share of the heads, and tree attention can run there. DeepSpeed drops
the attention mask on the way, which would train a tree as plain text; here the layer's `TreeMask` is passed around the
exchange, and attention refuses to run without it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from trl import SFTConfig

from ..attention import Tree, TreeMask
from ..attention.context import running_on
from ..data.collator import Batch
from ..trees.rows import TreePlan
from .compatibility import check_sequence_parallelism
from .gradient_scale import GradientCheck, get_gradient_scale
from .loss import LossContext, weighted_model
from .model import Forward, without_adapters
from .shared_rows import SharedRows


if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
    from peft import PeftModel

Mask: TypeAlias = TreeMask | Tensor | None
AttentionFunction: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
"""As transformers' `AttentionInterface` calls it: `(module, query, key, value, attention_mask, **kwargs)`."""


class SequenceParallel:
    """
    Trains rows that the ranks of a group share.

    Args:
        model (`transformers.PreTrainedModel`, `peft.PeftModel`):
            Model with trees enabled.
        args (`SinglePassSFTConfig`):
            Arguments of the run.
        accelerator (`accelerate.Accelerator`):
            Accelerator with `sp_size` above 1.
        has_router_loss (`bool`):
            Whether the run trains the load-balancing loss of a mixture of experts, which is refused.

    Raises:
        `ValueError`: If a setting or the model does not work with it; the message names it and the way out.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        accelerator: Accelerator,
        *,
        has_router_loss: bool,
    ) -> None:
        import deepspeed

        check_sequence_parallelism(model, args, accelerator, has_router_loss=has_router_loss)
        self._accelerator = accelerator
        self.size: int = accelerator.parallelism_config.sp_size
        base = without_adapters(model)
        self._attention = register_shared_attention(base.config.get_text_config()._attn_implementation)
        base.set_attn_implementation(self._attention)
        # accelerate accepts stock names only; DeepSpeed takes over whatever name stands here.
        accelerator.parallelism_config.sp_handler.sp_attn_implementation = self._attention
        deepspeed.init_distributed(auto_mpi_discovery=False)  # DeepSpeed makes its groups from its own handle
        self._gradient_check: GradientCheck | None = None

    def connect(
        self,
        loader: UlyssesSPDataLoaderAdapter,
        prepare: Callable[[Batch], Batch],
        pad_token_id: int,
        epoch: Callable[[], int],
    ) -> DataLoader[Batch]:
        """
        Pass the tree to attention, and rows to the ranks that share them, once DeepSpeed has taken over the model.

        Args:
            loader (`UlyssesSPDataLoaderAdapter`):
                DeepSpeed's loader of row parts, as the Trainer prepared it.
            prepare (`Callable`):
                Called with each whole row before it is cut.
            pad_token_id (`int`):
                Token that fills rows up to a length that the ranks can share.
            epoch (`Callable[[], int]`):
                Returns the number of the epoch that begins.

        Returns:
            `torch.utils.data.DataLoader`: Loader of parts of rows that keep their tree.
        """
        exchange = ALL_ATTENTION_FUNCTIONS[self._attention]
        attention = AttentionInterface._global_mapping[self._attention]
        if exchange is attention:
            raise RuntimeError("DeepSpeed did not take over attention under sequence parallelism; upgrade deepspeed.")
        ALL_ATTENTION_FUNCTIONS[self._attention] = with_tree(exchange, attention)
        return DataLoader(SharedRows(loader, prepare, pad_token_id, epoch), batch_size=None)

    def run_on_tree(self, plan: TreePlan) -> AbstractContextManager[Tree]:
        """Return a context that runs the model on parts of a row, given the plan of the whole row."""
        return running_on(tree_from_plan(plan, self._accelerator.device))

    def loss(
        self,
        compute_loss: Callable[..., object],
        engine: DeepSpeedEngine,
        batch: Batch,
        inputs: Batch,
        context: LossContext,
    ) -> Tensor:
        """
        Return this rank's part of the loss of a step, scaled such that the mean over ranks is the loss.

        TRL only computes the metrics: its loss would be the mean over batches of each batch's mean, not over tokens.

        Args:
            compute_loss (`Callable`):
                TRL's `compute_loss`.
            engine (`deepspeed.DeepSpeedEngine`):
                Model, as the Trainer wrapped it.
            batch (`Batch`):
                Part of a row, from [`SequenceParallel.connect`].
            inputs (`Batch`):
                What of it the model takes.
            context (`LossContext`):
                How its loss is scaled, and metrics by turn.
        """
        weights = F.pad(batch["loss_weights"], (1, 0))  # already aligned with `shift_labels`
        model: Forward = engine
        if context.turn_metrics is not None:
            model = context.turn_metrics.wrap(model, F.pad(batch["label_parts"], (1, 0)), weights)
        weighted = weighted_model(model, weights)
        sums: list[Tensor] = []

        def forward(**kwargs: object) -> ModelOutput:
            outputs = weighted(**kwargs)
            sums.append(-outputs.log_probs.sum())
            outputs.loss = outputs.loss.detach()
            return outputs

        compute_loss(forward, inputs)
        num_items = torch.as_tensor(context.num_items).clamp(min=torch.finfo(torch.float32).tiny)
        loss = sums[0] / num_items * self._accelerator.num_processes * context.divisor
        return self._with_right_gradient(engine, loss)

    def _with_right_gradient(self, engine: DeepSpeedEngine, loss: Tensor) -> Tensor:
        gradient_scale = get_gradient_scale(engine, self.size)
        if self._gradient_check is None:
            self._gradient_check = GradientCheck(engine, gradient_scale)
        return loss + (1 / gradient_scale - 1) * (loss - loss.detach())


def tree_from_plan(plan: TreePlan, device: torch.device) -> Tree:
    """Return the tree of a whole row from its plan alone, since batches hold parts of rows."""
    ends = np.zeros(plan.length, np.int64)
    for run in plan.runs:
        ends[run.start : run.end] = run.end
        for start, end in run.prefix:
            ends[start:end] = run.end
    subtree_end, depth = (torch.from_numpy(array)[None].to(device) for array in (ends, plan.depths()))
    return Tree(plan, subtree_end, depth)


# Attention -----------------------------------------------------------------------------------------------------------


def register_shared_attention(name: str) -> str:
    """
    Register tree attention for whole rows with a share of the heads, under a name that DeepSpeed may take over.

    Args:
        name (`str`):
            Registered name of tree attention.

    Returns:
        `str`: The new name.
    """
    shared = f"{name}_ulysses"
    AttentionInterface.register(shared, on_whole_rows(ALL_ATTENTION_FUNCTIONS[name]))
    AttentionMaskInterface.register(shared, AttentionMaskInterface._global_mapping[name])
    return shared


def on_whole_rows(attention: AttentionFunction) -> AttentionFunction:
    """Return tree attention that refuses to train without a tree, and takes its share of per-head parameters."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        mask = kwargs.pop("tree_mask", attention_mask)
        if module.training and not isinstance(mask, TreeMask):
            raise RuntimeError(
                f"{type(module).__name__} received no tree under sequence parallelism, and would train the row as one "
                "text. Train conversations only, through SinglePassSFTTrainer."
            )
        sinks = kwargs.get("s_aux")
        if sinks is not None and len(sinks) != query.shape[1]:
            kwargs["s_aux"] = _share_of_heads(sinks, query.shape[1])
        return attention(module, query, key, value, mask, *args, **kwargs)

    return attend


def _share_of_heads(per_head: Tensor, num_heads: int) -> Tensor:
    from deepspeed.utils import groups

    rank = groups._get_sequence_parallel_rank()
    return per_head[rank * num_heads : (rank + 1) * num_heads]


def with_tree(exchange: AttentionFunction, attention: AttentionFunction) -> AttentionFunction:
    """
    Return DeepSpeed's exchange of row parts for heads, with the layer's tree passed around it.

    Args:
        exchange (`AttentionFunction`):
            Function that DeepSpeed registered; it drops masks, but passes keyword arguments on.
        attention (`AttentionFunction`):
            What it calls inside.
    """

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not module.training:  # rows are not shared in evaluation
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        return exchange(module, query, key, value, None, *args, tree_mask=attention_mask, **kwargs)

    return attend
