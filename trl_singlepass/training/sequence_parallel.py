"""
Sequence parallelism (DeepSpeed Ulysses): the ranks of a group share each row, and attention sees all of it.

Each rank runs its part of the row through every layer; around layers that mix tokens, ranks exchange parts of the row
for heads (`attention/row_group.py`), so that tree attention runs on whole rows with a share of the heads. accelerate
makes the groups and DeepSpeed reduces gradients. DeepSpeed's own exchange is left out: it drops the attention mask,
which would train a tree as plain text, and expects the same heads in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from trl import SFTConfig

from ..attention import Tree, TreeMask
from ..attention.context import running_on
from ..attention.row_group import RowGroup
from ..data.collator import Batch
from ..engine.enable import Forward, without_adapters
from ..trees.prefix_tree import IGNORE_INDEX
from ..waves.engines import SharedRowEngine
from ..waves.loss import PER_TOKEN, RouterRecorder
from .compatibility import check_sequence_parallelism
from .gradient_scale import GradientCheck, get_gradient_scale
from .loss import LossContext
from .shared_rows import SharedRows
from .ulysses_preparation import allowing_global_sizes, allowing_recurrent_layers


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

    Takes a model with trees enabled. `recorder` holds the router logits of a mixture of experts whose load-balancing
    loss is trained. A setting or a model that does not work with shared rows raises `ValueError` with the way out.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        accelerator: Accelerator,
        recorder: RouterRecorder | None = None,
        router_loss_coef: float = 0.0,
    ) -> None:
        import deepspeed

        base = without_adapters(model)
        self._config = base.config.get_text_config()
        with allowing_global_sizes(self._config):
            check_sequence_parallelism(model, args, accelerator)
        self._accelerator = accelerator
        self._recorder, self._router_loss_coef = recorder, router_loss_coef
        self.size: int = accelerator.parallelism_config.sp_size
        self._attention = register_shared_attention(self._config._attn_implementation)
        base.set_attn_implementation(self._attention)
        # accelerate accepts stock names only; DeepSpeed takes over whatever name stands here.
        accelerator.parallelism_config.sp_handler.sp_attn_implementation = self._attention
        deepspeed.init_distributed(auto_mpi_discovery=False)  # DeepSpeed makes its groups from its own handle
        self._group: RowGroup | None = None
        self._gradient_check: GradientCheck | None = None

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Context in which the Trainer hands the model to accelerate and DeepSpeed."""
        with allowing_recurrent_layers(), allowing_global_sizes(self._config):
            yield

    def connect(
        self,
        loader: UlyssesSPDataLoaderAdapter,
        prepare: Callable[[Batch], Batch],
        pad_token_id: int,
        epoch: Callable[[], int],
    ) -> DataLoader[Batch]:
        """
        Pass the tree to attention, and rows to the ranks that share them, once DeepSpeed has taken over the model.

        Takes DeepSpeed's loader of row parts, as the Trainer prepared it; returns a loader of the rows of all ranks of
        the group, in turn. `prepare` is called with each row of this rank before other ranks get it, `pad_token_id`
        fills rows up to a length that the ranks can share, and `epoch` returns the number of the epoch that begins.
        """
        del ALL_ATTENTION_FUNCTIONS[self._attention]  # DeepSpeed's exchange, which drops the tree
        self._group = RowGroup(loader.sp_group, loader.sp_world_size, loader.sp_rank)
        return DataLoader(SharedRows(loader.dl, self._group, prepare, pad_token_id, epoch), batch_size=None)

    @property
    def group(self) -> RowGroup:
        """The ranks that share rows with this one."""
        assert self._group is not None, "`connect` made it"
        return self._group

    def watch_gradients(self, engine: DeepSpeedEngine) -> None:
        """Compare the gradients of the first step with their mean over ranks; called before the first backward."""
        if self._gradient_check is None:
            self._gradient_check = GradientCheck(engine, get_gradient_scale(engine, self.size))

    def wrap(self, engine: DeepSpeedEngine, tree: Tree) -> Forward:
        """
        Return the model as it runs a row in parts: it takes a whole row, and returns the outputs of TRL's fused head
        for all of it. `tree` has the ranks that share the row.
        """
        group, recorder = self.group, self._recorder
        shared = SharedRowEngine(engine, self._accelerator, 1.0, group)

        def forward(*, labels: Tensor, attention_mask: Tensor, **inputs: Any) -> ModelOutput:
            inputs.pop("tree")  # which the engine's parts of the row have from here
            shift_labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)
            with running_on(tree):
                outputs = shared.forward(attention_mask=attention_mask, shift_labels=shift_labels, **inputs)
            for name in PER_TOKEN:
                outputs[name] = outputs[name][:, :-1]
            if recorder is not None:
                load_balancing, router_logits = recorder.new_row(group), recorder.pop()
                load_balancing.count(router_logits, attention_mask)
                outputs.aux_loss = load_balancing.share(router_logits, attention_mask)
            return outputs

        return forward

    def loss(
        self,
        compute_loss: Callable[..., object],
        engine: DeepSpeedEngine,
        model: Forward,
        inputs: Batch,
        context: LossContext,
    ) -> Tensor:
        """
        Return the loss of a row, scaled such that the mean over ranks is its part of the loss of the step.

        TRL only computes the metrics: its loss would be the mean over batches of each batch's mean, not over tokens.

        `compute_loss` is TRL's; `model` is the one that runs a row, with the weight of each target; `inputs` are those
        of the whole row.
        """
        losses: list[Tensor] = []

        def forward(*, shift_labels: Tensor, **options: object) -> ModelOutput:
            outputs = model(**options | inputs)
            num_items = torch.as_tensor(context.num_items).clamp(min=torch.finfo(torch.float32).tiny)
            loss = -outputs.log_probs.sum() / num_items * (self._accelerator.num_processes // self.size)
            if outputs.aux_loss is not None:
                loss = loss + self._router_loss_coef * outputs.aux_loss / context.num_batches
            losses.append(loss)
            outputs.loss = loss.detach()
            return outputs

        own = self.group.part(inputs["attention_mask"])  # TRL counts tokens on all ranks
        compute_loss(forward, {**inputs, "attention_mask": own, "shift_labels": inputs["labels"]})
        scale = 1 / get_gradient_scale(engine, self.size)
        return losses[0] + (scale - 1) * (losses[0] - losses[0].detach())


# Attention -----------------------------------------------------------------------------------------------------------


def register_shared_attention(name: str) -> str:
    """
    Register tree attention on rows that ranks share, under a name that DeepSpeed may take over; return that name.
    """
    shared = f"{name}_ulysses"
    AttentionInterface.register(shared, on_shared_rows(ALL_ATTENTION_FUNCTIONS[name]))
    AttentionMaskInterface.register(shared, AttentionMaskInterface._global_mapping[name])
    return shared


def on_shared_rows(attention: AttentionFunction) -> AttentionFunction:
    """Return tree attention that takes this rank's part of a row, and refuses to train without a tree."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        group = attention_mask.tree.group if isinstance(attention_mask, TreeMask) else None
        if group is None:
            if module.training:  # rows are not shared in evaluation
                raise RuntimeError(
                    f"{type(module).__name__} received no tree under sequence parallelism, and would train the row as "
                    "one text. Train conversations only, through SinglePassSFTTrainer."
                )
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        heads = query.shape[1]
        if kwargs.get("s_aux") is not None:
            kwargs["s_aux"] = group.share_of_heads(kwargs["s_aux"])
        row = [group.to_heads(x.transpose(1, 2), heads).transpose(1, 2) for x in (query, key, value)]
        output, weights = attention(module, *row, attention_mask, *args, **kwargs)
        return group.to_tokens(output, heads), weights

    return attend
