"""
Sequence parallelism (DeepSpeed Ulysses): the ranks of a group share each row, and attention sees all of it.

Each rank runs its part of the row through every layer; around attention, ranks trade parts of the row for attention
heads. So attention runs on whole rows with a share of the heads, and tree attention can be what runs there. DeepSpeed
drops the attention mask on the way, which would train a tree as plain text; here the layer's `TreeMask` goes around
that, and attention refuses to run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import Tree, TreeMask
from ..attention.context import running_on
from ..data.collator import pad_batch
from ..trees.rows import TreePlan
from .compatibility import check_sequence_parallelism
from .gradient_scale import GradientCheck, overcounting_of
from .loss import weighted_model
from .model import without_adapters


class SequenceParallel:
    """
    Sequence parallelism of a trainer, its model under tree attention.

    Args:
        trainer (`SinglePassSFTTrainer`):
            Trainer whose accelerator has `sp_size` above 1.

    Raises:
        `ValueError`: If a setting or the model does not work with it; the message names it and the way out.
    """

    def __init__(self, trainer: Any) -> None:
        import deepspeed

        check_sequence_parallelism(trainer)
        self.trainer = trainer
        self.size: int = trainer.accelerator.parallelism_config.sp_size
        base = without_adapters(trainer.model)
        self._attention = register_shared_attention(base.config.get_text_config()._attn_implementation)
        base.set_attn_implementation(self._attention)
        # accelerate accepts stock names only; DeepSpeed takes over whatever name stands here.
        trainer.accelerator.parallelism_config.sp_handler.sp_attn_implementation = self._attention
        deepspeed.init_distributed(auto_mpi_discovery=False)  # DeepSpeed makes its groups from its own handle
        self._gradient_check: GradientCheck | None = None

    def connect(self, loader: Any) -> DataLoader[Any]:
        """
        Hand the tree to attention and share rows among ranks, once DeepSpeed has taken over the model.

        Args:
            loader (`UlyssesSPDataLoaderAdapter`):
                Data loader that shares rows, as the Trainer prepared it.

        Returns:
            `torch.utils.data.DataLoader`: Loader of parts of rows that keep their tree.
        """
        exchange = ALL_ATTENTION_FUNCTIONS[self._attention]
        attention = AttentionInterface._global_mapping[self._attention]
        if exchange is attention:
            raise RuntimeError("DeepSpeed did not take over attention under sequence parallelism; upgrade deepspeed.")
        ALL_ATTENTION_FUNCTIONS[self._attention] = with_tree(exchange, attention)
        return DataLoader(SharedRows(loader, self.trainer), batch_size=None)

    @classmethod
    def of(cls, trainer: Any) -> SequenceParallel | None:
        """Return the sequence parallelism of a trainer, `None` if it has none."""
        config = trainer.accelerator.parallelism_config
        return cls(trainer) if config is not None and getattr(config, "sp_size", 1) > 1 else None

    def loss(
        self,
        compute: Callable[..., Any],
        model: Any,
        plan: TreePlan,
        inputs: dict[str, Any],
        label_parts: torch.Tensor,
        num_items: Any,
    ) -> torch.Tensor:
        """
        Return this rank's part of the loss of a step, scaled such that the mean over ranks is the loss.

        TRL computes the metrics. Its loss would be the mean over batches of each batch's mean, not over all tokens.

        Args:
            compute (`Callable`):
                TRL's `compute_loss`.
            model (`deepspeed.DeepSpeedEngine`):
                Model, as the Trainer wrapped it.
            plan (`TreePlan`):
                Structure of the whole row.
            inputs (`dict[str, Any]`):
                Part of the row.
            label_parts (`torch.Tensor` of shape `(1, part_length)`, `torch.int64`):
                What the labels of the part belong to, aligned with `shift_labels`.
            num_items (`torch.Tensor`):
                Sum of the loss weights of the step over all ranks.
        """
        weights = F.pad(inputs.pop("loss_weights"), (1, 0))  # already aligned with `shift_labels`
        weighted = weighted_model(self.trainer._by_turn(model, F.pad(label_parts, (1, 0)), weights), weights)
        sums: list[torch.Tensor] = []

        def forward(**kwargs: Any) -> Any:
            outputs = weighted(**kwargs)
            sums.append(-outputs.log_probs.sum())
            outputs.loss = outputs.loss.detach()
            return outputs

        trainer = self.trainer
        with running_on(tree_of(plan, trainer.args.device)) as tree:
            compute(forward, inputs)
        trainer._check_layers_once(tree)
        loss = sums[0] / num_items.clamp(min=torch.finfo(torch.float32).tiny) * trainer.accelerator.num_processes
        if getattr(trainer, "loss_is_scaled_for_ga", None) is not True:
            loss = loss * trainer.current_gradient_accumulation_steps  # by which the Trainer divides
        return self._with_right_gradient(model, loss)

    def _with_right_gradient(self, engine: Any, loss: torch.Tensor) -> torch.Tensor:
        overcounting = overcounting_of(engine, self.size)
        if self._gradient_check is None:
            self._gradient_check = GradientCheck(engine, overcounting)
        return loss + (1 / overcounting - 1) * (loss - loss.detach())


def tree_of(plan: TreePlan, device: torch.device) -> Tree:
    """
    Return the tree of a whole row from its plan alone, since batches hold parts of rows.

    Args:
        plan (`TreePlan`):
            Structure of the row.
        device (`torch.device`):
            Device of the tensors.
    """
    ends = np.zeros(plan.length, np.int64)
    for run in plan.runs:
        ends[run.start : run.end] = run.end
        for start, end in run.prefix:
            ends[start:end] = run.end
    subtree_end, depth = (torch.from_numpy(array)[None].to(device) for array in (ends, plan.depths()))
    return Tree(plan, subtree_end, depth)


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


def on_whole_rows(attention: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return an attention function that runs on a tree while training, or not at all.

    Args:
        attention (`Callable`):
            Tree attention, as transformers' `AttentionInterface` calls it.
    """

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        mask = kwargs.pop("tree_mask", attention_mask)
        if module.training and not isinstance(mask, TreeMask):
            raise RuntimeError(
                f"{type(module).__name__} got no tree under sequence parallelism, and would train the row as one "
                "text. Train conversations only, through SinglePassSFTTrainer."
            )
        sinks = kwargs.get("s_aux")
        if sinks is not None and len(sinks) != query.shape[1]:
            kwargs["s_aux"] = _share_of_heads(sinks, query.shape[1])
        result: tuple[torch.Tensor, Any] = attention(module, query, key, value, mask, *args, **kwargs)
        return result

    return attend


def _share_of_heads(per_head: torch.Tensor, num_heads: int) -> torch.Tensor:
    from deepspeed.utils import groups

    rank = groups._get_sequence_parallel_rank()
    return per_head[rank * num_heads : (rank + 1) * num_heads]


def with_tree(exchange: Callable[..., Any], attention: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return DeepSpeed's exchange of row parts for heads, with the layer's tree handed around it.

    Args:
        exchange (`Callable`):
            Attention function that DeepSpeed registered; it drops masks, and passes keyword arguments on.
        attention (`Callable`):
            What it calls inside.
    """

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        if not module.training:  # rows are not shared in evaluation
            result: tuple[torch.Tensor, Any] = attention(module, query, key, value, attention_mask, *args, **kwargs)
        else:
            result = exchange(module, query, key, value, None, *args, tree_mask=attention_mask, **kwargs)
        return result

    return attend


class SharedRows(IterableDataset[dict[str, Any]]):
    """
    Parts of rows: each row of each rank of a group in turn, cut among the ranks of the group.

    Args:
        adapter (`UlyssesSPDataLoaderAdapter`):
            DeepSpeed's own loader of such parts, for the loader inside it, its group and its rank.
        trainer (`SinglePassSFTTrainer`):
            Trainer, for the padding token and the epoch.
    """

    def __init__(self, adapter: Any, trainer: Any) -> None:
        self.adapter, self.trainer = adapter, trainer

    def __len__(self) -> int:
        return len(self.adapter)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        adapter = self.adapter
        if hasattr(adapter.dl, "set_epoch"):
            adapter.dl.set_epoch(int(self.trainer.state.epoch or 0))
        yield from type(adapter)(
            self._whole_rows(), adapter.sp_rank, adapter.sp_group, adapter.sp_world_size, adapter.device
        )

    def _whole_rows(self) -> Iterator[dict[str, Any]]:
        for batch in self.adapter.dl:
            yield self._ready_to_cut(self.trainer._without_repeated_rows(batch))

    def _ready_to_cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with weights where DeepSpeed puts labels, without what a part of a row cannot use."""
        whole = {name: value for name, value in batch.items() if name != "subtree_end"}
        weights = whole.get("loss_weights", (whole["labels"] != -100).float())
        whole["loss_weights"] = F.pad(weights[:, 1:], (0, 1))
        whole["label_parts"] = F.pad(whole["label_parts"][:, 1:], (0, 1))
        return pad_batch(whole, self._common_length(whole["tree_plan"].length), self.trainer._tokenizer.pad_token_id)

    def _common_length(self, length: int) -> int:
        """Length that the group can share; gloo gathers only tensors of one size, other backends of any."""
        size: int = self.adapter.sp_world_size
        if self.adapter.device.type == "cpu":
            longest = torch.tensor(length)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=self.adapter.sp_group)
            length = int(longest)
        return -(-length // size) * size
