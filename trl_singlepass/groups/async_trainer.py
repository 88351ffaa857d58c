"""
`SinglePassAsyncGRPOTrainer`: TRL's experimental AsyncGRPO, with the rows of a step on this project's kernels.

TRL merges the samples of a step in prefix trees already. It runs them on one kernel, for models whose layers that
kernel has, and turns generated tokens that a template rewrites into context. Here any model runs that trees can run,
and every generated token is trained in the request that generated it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer
from trl.experimental.async_grpo.packing import TreeRow

from ..data.collator import Batch, Collator, DataCollatorForSinglePass
from ..data.preparation import say
from ..data.row_tree import RowTree
from ..training.config import EngineConfig, check_engine_settings, complete_config, use_new_names
from ..training.mixin import ReferenceMixin
from ..training.refusals import ASYNC, ENGINES, check
from ..training.situation import Situation
from ..trees.rows import TreePlan


_MULTIPLICITY = "multiplicity"  # of a batch: the number of samples that pass through each token


@dataclass
class SinglePassAsyncGRPOConfig(EngineConfig, AsyncGRPOConfig):  # type: ignore[misc] # TRL does not type it
    """
    Configuration class for the [`SinglePassAsyncGRPOTrainer`]: arguments of TRL's `AsyncGRPOConfig` and
    [`EngineConfig`], where `token_budget` bounds a row and `model_init_kwargs` may name an attention implementation.
    """

    fork_threshold_tokens: int = field(
        default=0,
        metadata={"help": "0 trains every generated token; TRL's 1024 makes context of some, and is refused."},
    )

    def __post_init__(self) -> None:
        use_new_names(self)
        super().__post_init__()
        check_engine_settings(self)


class SinglePassAsyncGRPOTrainer(ReferenceMixin, AsyncGRPOTrainer):  # type: ignore[misc]
    """
    Trainer that computes AsyncGRPO's loss on trees, for any model and attention that trees run on.

    A drop-in replacement of TRL's `AsyncGRPOTrainer`, with its arguments. `args` is a [`SinglePassAsyncGRPOConfig`].

    Raises:
        `ValueError`: If a setting or model cannot be trained on trees; the error names the cause and a fix.
    """

    _tag_names: ClassVar = ["trl", "async-grpo", "single-pass"]
    _name = "SinglePassAsyncGRPO"
    _peak_flops_per_device: float | None

    def __init__(self, model: str, reward_funcs: Any = None, args: Any = None, *others: Any, **kwargs: Any) -> None:
        args = complete_config(args, SinglePassAsyncGRPOConfig, model)
        if args.fork_threshold_tokens == AsyncGRPOConfig.fork_threshold_tokens:
            say("fork_threshold_tokens is 0 here: every generated token is trained.", logging.INFO)
            args.fork_threshold_tokens = 0
        check(Situation(args), ASYNC)
        with _any_model(args):
            super().__init__(model, reward_funcs, args, *others, **kwargs)
        check(self._situation, ENGINES, ASYNC)
        try:
            async_grpo_trainer.compute_flops_per_token(self.model.config.get_text_config(), 1)
        except AttributeError:  # of a family that TRL refuses; then nothing reads the number, and it isn't logged
            self._peak_flops_per_device = None
        self._run_on_trees()
        self._pieces = self._make_pieces("wave_tokens")
        self._row_collator = DataCollatorForSinglePass(self.processing_class.pad_token_id)

    def _checked_collator(self, collator: Collator) -> Collator:
        return collator  # TRL packs rows in one of its own

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Let batches say how many samples pass through each token, which load-balancing losses count."""
        loader: Any = super().get_train_dataloader()
        plain: DataLoader[Batch] = loader.base_dataloader
        collate = plain.collate_fn

        def with_multiplicity(examples: list[list[TreeRow]]) -> Batch:
            batch: Batch = collate(examples)
            batch[_MULTIPLICITY] = pad_sequence(list(map(_multiplicity, examples[0])), batch_first=True)
            return batch

        plain.collate_fn = with_multiplicity
        dispatched: DataLoader[Batch] = loader
        return dispatched

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, _MULTIPLICITY]))

    def _log_step_metrics(self) -> None:
        """Count no operations where no share of the device's peak is logged; TRL can't for all families."""
        count = async_grpo_trainer.compute_flops_per_token if self._peak_flops_per_device else lambda *_: 0
        with patch.object(async_grpo_trainer, "compute_flops_per_token", count):
            super()._log_step_metrics()

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Compute TRL's loss on the tree of a row, which TRL asks its own kernel for."""
        row = _row(inputs)
        self._self_check.check(model, [row], self._row_collator)
        trains = torch.is_grad_enabled()
        if trains:
            num_trained = (inputs["token_index"] >= 0).sum()
            self._counts.add([row], self.accelerator.gather(num_trained[None]).sum())
        runner = self._pieces.runner(model, [row], trains=trains)

        def run(**given: Any) -> ModelOutput:
            asked = {name: value for name, value in given.items() if not name.startswith("tree_")}
            asked |= {"attention_mask": row["attention_mask"], "tree": row["tree"].handled()}
            if runner is None:
                outputs: ModelOutput = model(**asked)
                return outputs
            return runner(labels=row["labels"], **{name: x for name, x in asked.items() if name != "shift_labels"})

        loss: torch.Tensor = super().compute_loss(run, inputs, return_outputs, num_items_in_batch)
        return loss if runner is None or not trains else runner.backward(loss)


def _row(inputs: Batch) -> Batch:
    """Return the row of this rank, with its tree, as a batch of this project."""
    is_token = inputs["attention_mask"].bool()
    names = ("input_ids", "position_ids", "shift_labels", _MULTIPLICITY)
    ids, depths, targets, multiplicity = (inputs[name][is_token][None] for name in names)
    labels = targets.roll(1, dims=1)  # the last position predicts nothing
    tree = tree_of_depths(depths)
    counted = replace(tree.plan, num_sample_tokens=int(multiplicity.sum()), example_ends=(depths.numel(),))
    named = {"input_ids": ids, "position_ids": depths, "attention_mask": multiplicity, "labels": labels}
    return {**named, "tree": tree.replace(plan=counted)}


def tree_of_depths(position_ids: torch.Tensor) -> RowTree:
    """
    Return the tree of a row, on which a model runs it: `model(input_ids, position_ids=…, tree=tree_of_depths(…))`.

    `position_ids`, int64 of shape `(length,)` or `(1, length)`, holds the depth of each token in the order of a
    depth-first walk, as `TreeRow.pack` of TRL's AsyncGRPO lays it out. The depths `[0, 1, 2, 2, 1]` are a token with
    two children, the first of which has two. On an accelerator, this waits for them.

    Raises `ValueError` if a depth is larger by more than one than that of the token before it.
    """
    depths = position_ids.reshape(-1).cpu().numpy()
    if (np.diff(depths, prepend=-1) > 1).any():
        raise ValueError("position_ids are no depths of a depth-first walk. Give those that TreeRow.pack returns.")
    subtree_end = _subtree_ends(depths)
    on_device = torch.from_numpy(np.stack([subtree_end, depths, np.zeros_like(depths)])).to(position_ids.device)
    return RowTree(TreePlan.from_subtree_end(subtree_end), *on_device[:, None])


def _subtree_ends(depths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position past the last descendant of each token: that of the next token that is no deeper."""
    ends, path = np.full(len(depths), len(depths)), list[int]()
    for position, depth in enumerate(depths.tolist()):
        ends[path[depth:]] = position
        path[depth:] = [position]
    return ends


def _multiplicity(row: TreeRow) -> torch.Tensor:
    """Return how many samples pass through each token of a row, in the order in which TRL packs them: depth first."""
    counts = [0] * len(row.tokens)
    for node in (node for nodes in row.sample_nodes for node in nodes):
        counts[node] += 1
    ordered, stack = [], list(reversed(row.roots.values()))
    while stack:
        node = stack.pop()
        ordered.append(counts[node])
        stack.extend(reversed(row.children[node].values()))
    return torch.tensor(ordered)


@contextmanager
def _any_model(args: AsyncGRPOConfig) -> Iterator[None]:
    """
    Let TRL's constructor load any model, with the attention that is set.

    It loads the model for its own kernel, and refuses what that lacks (recurrent layers, sinks) before it adds its
    head. Between these two calls, the model does not say that it has them; the measured check is what stops a model
    that trees cannot run.
    """
    given = args.model_init_kwargs
    own = dict(given or {})
    attention = {name: own.pop(name) for name in ("attn_implementation",) if name in own}
    load, add_head = async_grpo_trainer.create_model_from_path, async_grpo_trainer.add_fused_lm_head
    peak, layer_types = async_grpo_trainer.get_peak_flops_per_device, None

    def load_quietly(path: str, *, attn_implementation: str, **options: Any) -> PreTrainedModel:
        nonlocal layer_types
        model: Any = load(path, **options, **attention)
        layer_types = vars(model.config.get_text_config()).get("layer_types")
        vars(model.config.get_text_config())["layer_types"] = None
        named = model.named_parameters
        model.named_parameters = lambda *a, **k: ((f"{name} ", value) for name, value in named(*a, **k))
        return model

    def add_head_to_all(model: PreTrainedModel, **options: Any) -> None:
        del model.named_parameters
        vars(model.config.get_text_config())["layer_types"] = layer_types
        add_head(model, **options)

    def peak_flops(*device: Any) -> float | None:  # TRL asks CUDA
        return None if torch.accelerator.current_accelerator(check_available=True) is None else peak(*device)

    args.model_init_kwargs = own
    replaced: dict[str, Any] = {"create_model_from_path": load_quietly, "add_fused_lm_head": add_head_to_all}
    try:
        with patch.multiple(async_grpo_trainer, get_peak_flops_per_device=peak_flops, **replaced):
            yield
    finally:
        args.model_init_kwargs = given
