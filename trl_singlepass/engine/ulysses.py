"""
Sequence parallelism (DeepSpeed Ulysses): the ranks of a group share each row, and attention sees all of it.

Each rank runs its part of the row through every layer; around layers that mix tokens, ranks exchange parts of the row
for heads (`attention/row_group.py`), so that tree attention runs on whole rows with a share of the heads. accelerate
makes the groups and DeepSpeed reduces gradients. DeepSpeed's own exchange is left out: it drops the attention mask,
which would train a tree as plain text, and expects the same heads in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import accelerate.accelerator
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import TreeMask
from ..attention.row_group import RowGroup
from ..data.collator import Batch, pad_batch
from .borrowed_state import attributes


if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
    from transformers import PreTrainedConfig

Mask: TypeAlias = TreeMask | Tensor | None
AttentionFunction: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
"""As transformers' `AttentionInterface` calls it: `(module, query, key, value, attention_mask, **kwargs)`."""


class SequenceParallel:
    """Lets the ranks of a group share rows. Takes a model with trees enabled, without adapters or wrappers."""

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator) -> None:
        import deepspeed

        self._config = model.config.get_text_config()
        self.size: int = accelerator.parallelism_config.sp_size
        self._attention = register_shared_attention(self._config._attn_implementation)
        model.set_attn_implementation(self._attention)
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

        Takes DeepSpeed's loader of row parts, as the Trainer prepared it; returns [`SharedRows`].
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


# Attention -----------------------------------------------------------------------------------------------------------


def register_shared_attention(name: str) -> str:
    """Register tree attention on rows that ranks share, under a name that DeepSpeed may take over; return the name."""
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


# Rows ----------------------------------------------------------------------------------------------------------------


class SharedRows(IterableDataset[Batch]):
    """
    Rows of all ranks of a group, in turn, each whole: which tokens a rank runs depends on how the row is run.

    `loader` has this rank's own rows, and `prepare` is called with each before other ranks get it. `pad_token_id`
    fills rows up; `epoch` returns the number of the epoch that begins.
    """

    def __init__(
        self,
        loader: DataLoader[Batch],
        group: RowGroup,
        prepare: Callable[[Batch], Batch],
        pad_token_id: int,
        epoch: Callable[[], int],
    ) -> None:
        self._loader, self._group, self._prepare = loader, group, prepare
        self._pad_token_id, self._epoch = pad_token_id, epoch

    def __len__(self) -> int:
        return len(self._loader) * self._group.size

    def __iter__(self) -> Iterator[Batch]:
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self._epoch())
        for batch in self._loader:
            own = self._prepare(batch)
            own = pad_batch(own, self._group.padded_length(own["tree"].plan.length), self._pad_token_id)
            own = send_to_device({**own, "tree": own["tree"].replace(is_shared=True)}, "cpu")
            rows: list[Batch] = [{} for _ in range(self._group.size)]
            torch.distributed.all_gather_object(rows, own, group=self._group.process_group)
            yield from rows


# Preparation ---------------------------------------------------------------------------------------------------------


def allowing_global_sizes(config: PreTrainedConfig) -> AbstractContextManager[None]:
    """Let DeepSpeed read one head size from a configuration whose layers have several (Gemma 4); trees need none."""
    is_heterogeneous = getattr(config, "is_heterogeneous", False)
    return attributes(config, **({"allow_global_per_layer_attribute_access": True} if is_heterogeneous else {}))


def allowing_recurrent_layers() -> AbstractContextManager[None]:
    """
    Keep accelerate from refusing models with recurrent layers, as it does from 1.15 on.

    In the code that it knows, such a layer would start anew on each rank. Here, the layer gets the whole row.
    """
    name = "_refuse_recurrent_layers_under_sequence_parallelism"
    refuses = hasattr(accelerate.accelerator, name)
    return attributes(accelerate.accelerator, **({name: lambda model: None} if refuses else {}))


# Gradients -----------------------------------------------------------------------------------------------------------


def get_gradient_scale(engine: DeepSpeedEngine, sp_size: int) -> int:
    """
    Return how many times too large DeepSpeed makes gradients where `sp_size` ranks share rows.

    It divides their sum by the number of ranks with ZeRO-3's reduce-scatter, but by the number of groups elsewhere
    (DeepSpeed issue 5248). Adam hides the difference; gradient clipping, SGD and the logged norm do not.
    """
    scatters = engine.zero_optimization_stage() == 3 and engine.zero_reduce_scatter()
    return 1 if scatters else sp_size


class GradientCheck:
    """Compares one gradient after DeepSpeed's reduction with `scale` times its mean over ranks, in the first step."""

    def __init__(self, engine: DeepSpeedEngine, scale: int) -> None:
        self.engine, self.scale = engine, scale
        trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        # The last one: the first factor of an adapter has no gradient yet.
        self.parameter = trainable[-1]
        self.local: torch.Tensor | None = None
        self._hook = self.parameter.register_hook(self._add)
        self._step = engine.step
        engine.step = self._checked_step

    def _add(self, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self.local = gradient.clone() if self.local is None else self.local + gradient

    def _checked_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._compare():
            self._hook.remove()
            self.engine.step = self._step
        return self._step(*args, **kwargs)

    def _compare(self) -> bool:
        """Return whether there was a gradient to compare; raise if its scale is not the expected one."""
        from deepspeed.utils import safe_get_full_grad

        reduced = safe_get_full_grad(self.parameter)
        if self.local is None or reduced is None:
            return False
        expected, self.local = self.local, None
        torch.distributed.all_reduce(expected)
        expected = expected * (self.scale / torch.distributed.get_world_size())
        norm = float(expected.norm())
        if norm == 0:
            return False
        ratio = float((reduced.to(expected.dtype).flatten() @ expected.flatten()) / norm**2)
        if abs(ratio - 1) > 0.1:
            raise RuntimeError(
                f"DeepSpeed returned gradients {ratio:.3g} times as large as their mean over ranks under sequence "
                "parallelism: clipping, SGD and the logged norm would be wrong by that factor. Use ZeRO-3 with its "
                "default reduce_scatter, without fp16."
            )
        return True
