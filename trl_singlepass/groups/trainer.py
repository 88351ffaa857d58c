"""
`SinglePassGRPOTrainer` and `SinglePassRLOOTrainer`: TRL's trainers, with the completions of a batch on prefix trees.

Generation, rewards, advantages, losses and logs are TRL's. What differs is where log-probabilities come from: lines
that begin alike share what they have in common, of the policy, the old policy and the reference alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from trl import GRPOTrainer, RLOOTrainer

from ..data.collator import Batch, Collator, DataCollatorForSinglePass
from ..data.preparation import say
from ..engine.enable import enable_tree
from ..engine.pieces import Pieces
from ..engine.row_runner import RowRunner
from ..training.base_config import add_settings, short_name
from ..training.mixin import SinglePassTrainerMixin
from ..training.refusals import ENGINES, GROUPS, check, check_parts
from ..training.sharding import prepare_sharding, stop_prefetching
from ..training.situation import Situation
from .config import SinglePassGRPOConfig, SinglePassRLOOConfig
from .forecast import forecast_sharing
from .lines import Lines, are_without_gaps


# Below this, rows save less than building them costs, and lines run as TRL runs them.
_LEAST_SHARING = 1.03
# Losses whose mean over a step is the same however its samples are divided among its batches.
_ANY_ORDER = frozenset({"grpo", "dr_grpo", "dapo", "cispo", "vespo", "sapo", "luspo"})

Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Log-probabilities and entropies, of shape `(num_lines, completion_length)`, and the load-balancing loss."""


class GroupsMixin(SinglePassTrainerMixin):
    """What both trainers override; it stands before TRL's."""

    _pieces: Pieces
    _buffered_inputs: list[Batch] | None
    _runner: RowRunner | None = None  # of the loss that is being computed

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        run = Situation(self.args, self.model, self.accelerator, tp_size=self.get_tp_size())
        check(run, ENGINES, GROUPS)
        bounding = [name for name in ("wave_tokens", "max_row_tokens") if getattr(self.args, name) is not None]
        if bounding:
            stop_prefetching(self.accelerator)
            check_parts(run)
        prepare_sharding(self.model, self.accelerator)
        for each in (self.model,) if self.ref_model is None else (self.model, self.ref_model):
            enable_tree(self.accelerator.unwrap_model(each, keep_torch_compile=False))
        self._pieces = Pieces(
            self.model,
            self.args,
            self.accelerator,
            setting=bounding[0] if bounding else None,
            knows_loss=False,
            has_router_loss=self.aux_loss_enabled,
        )
        self._row_collator = DataCollatorForSinglePass(self._tokenizer.pad_token_id)
        if self.accelerator.is_main_process:
            say(*forecast_sharing(self.train_dataset, self.processing_class, self.args))

    def _checked_collator(self, collator: Collator) -> Collator:
        return collator  # which makes no rows

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        """Let batches hold lines that begin alike; TRL shuffles the lines of a step before it divides them."""
        before = self._buffered_inputs
        inputs: Batch = super()._prepare_inputs(generation_batch)
        buffered = self._buffered_inputs
        if not self.model.training or buffered is None or buffered is before or not self._may_be_ordered(inputs):
            return inputs
        num_batches = self.args.gradient_accumulation_steps
        steps = [buffered[start : start + num_batches] for start in range(0, len(buffered), num_batches)]
        self._buffered_inputs = [batch for step in steps for batch in _grouped(step)]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _may_be_ordered(self, inputs: Batch) -> bool:
        """Return whether the loss of a step is the same in any order of its lines; means over tokens are not."""
        args = self.args
        return (
            getattr(args, "loss_type", "grpo") in _ANY_ORDER
            and getattr(args, "top_entropy_quantile", 1.0) == 1.0
            and not getattr(self, "_entropy_bonus_enabled", False)
            and not self.aux_loss_enabled
            and inputs.get("pixel_values") is None
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> Scores:
        """Score completions on trees; TRL runs each line with its whole prompt."""
        options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        if images.get("pixel_values") is not None or not are_without_gaps(attention_mask):
            stock: Scores = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **options, **images
            )
            return stock
        size = batch_size or len(input_ids)
        parts = [
            self._score(model, ids, mask, logits_to_keep, **options)
            for ids, mask in zip(torch.split(input_ids, size), torch.split(attention_mask, size), strict=True)
        ]
        log_probs, entropies, aux_losses = zip(*parts, strict=True)
        return (
            torch.cat(log_probs),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _score(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *,
        compute_entropy: bool,
        compute_aux_loss: bool,
    ) -> Scores:
        """Score lines that run together."""
        is_scored = torch.zeros_like(attention_mask)
        is_scored[:, -logits_to_keep:] = 1
        lines = Lines.from_padded(input_ids, attention_mask, is_scored, self._row_collator, self.args.max_row_tokens)
        trains = torch.is_grad_enabled()
        if trains:
            self._counts.add(lines.view.rows, attention_mask[:, -logits_to_keep:].sum())
        if self._shares_too_little(lines):
            stock: Scores = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
            )
            return stock
        self._self_check.check(model, lines.view.rows, self._row_collator)
        divisor = 1 if self.loss_is_scaled_for_ga else getattr(self, "current_gradient_accumulation_steps", 1)
        runner = self._pieces.runner(model, lines.view.rows, divisor=divisor, trains=trains)
        self._runner = runner if trains else self._runner
        router = {"output_router_logits": True} if compute_aux_loss else {}
        with self.accelerator.autocast():
            outputs = (model if runner is None else runner)(
                input_ids=input_ids, labels=lines.labels, tree=lines.view.handled(), fused_lm_head=True, **router
            )
        entropies = outputs.entropy[:, -logits_to_keep:] if compute_entropy else None
        return outputs.log_probs[:, -logits_to_keep:], entropies, outputs.aux_loss if compute_aux_loss else None

    def _shares_too_little(self, lines: Lines) -> bool:
        """Return whether lines run as TRL runs them; on every rank, as some meet inside the model."""
        if self._pieces.setting is not None:
            return False  # which bounds memory
        own = torch.tensor([lines.sharing_factor], device=self.accelerator.device)
        return bool(self.accelerator.gather(own).max() < _LEAST_SHARING)

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """Run the backward of all pieces but the last, where a batch runs in several."""
        self._runner = None
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        runner: RowRunner | None = self._runner
        self._runner = None
        return loss if runner is None or not loss.requires_grad else runner.backward(loss)


def _grouped(step: Sequence[Batch]) -> list[Batch]:
    """Return the batches of a step with its lines in the order of their tokens: equal beginnings lie together."""
    size = len(step[0]["prompt_ids"])
    lines = [_tokens(batch, i) for batch in step for i in range(size)]
    order = sorted(range(len(lines)), key=lines.__getitem__)
    whole = {name: _join([batch[name] for batch in step], size) for name in step[0]}
    return [
        {name: _take(values, order[start : start + size], len(lines)) for name, values in whole.items()}
        for start in range(0, len(lines), size)
    ]


def _tokens(batch: Batch, line: int) -> list[int]:
    parts = ((batch[f"{name}_ids"][line], batch[f"{name}_mask"][line].bool()) for name in ("prompt", "completion"))
    return [token for ids, mask in parts for token in ids[mask].tolist()]


def _join(values: list[Any], size: int) -> Any:
    """Return what the batches of a step have under one name, line by line; what is not by line stays as it is."""
    first = values[0]
    if isinstance(first, torch.Tensor) and first.ndim:
        return torch.cat(values)
    return [value for of_batch in values for value in of_batch] if isinstance(first, list) else first


def _take(values: Any, lines: list[int], num_lines: int) -> Any:
    if isinstance(values, torch.Tensor) and values.ndim:
        return values[lines]
    return [values[i] for i in lines] if isinstance(values, list) else values


class SinglePassGRPOTrainer(GroupsMixin, GRPOTrainer):
    """
    Trainer that computes GRPO's loss with the shared prefixes of completions run once.

    A drop-in replacement of [`~trl.GRPOTrainer`], with its arguments. The completions of a prompt share the prompt,
    and all else that they begin with alike. `args` is a [`SinglePassGRPOConfig`]; a [`~trl.GRPOConfig`] gets the
    settings that it lacks, at their defaults.

    Raises:
        `ValueError`: If a setting or model cannot be trained on trees; it names it, and the way out.

    Example: `SinglePassGRPOTrainer("Qwen/Qwen3-0.6B", reward_funcs=reward, train_dataset=dataset).train()`.
    """

    _tag_names: ClassVar = ["trl", "grpo", "single-pass"]
    _name = "SinglePassGRPO"

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **kwargs: Any) -> None:
        args = SinglePassGRPOConfig(f"{short_name(model)}-{self._name}") if args is None else args
        args = add_settings(args, SinglePassGRPOConfig)
        super().__init__(model, reward_funcs, args, *others, **kwargs)


class SinglePassRLOOTrainer(GroupsMixin, RLOOTrainer):
    """
    Trainer that computes RLOO's loss with the shared prefixes of completions run once.

    A drop-in replacement of [`~trl.RLOOTrainer`], as [`SinglePassGRPOTrainer`] is of [`~trl.GRPOTrainer`].
    """

    _tag_names: ClassVar = ["trl", "rloo", "single-pass"]
    _name = "SinglePassRLOO"

    def __init__(self, model: Any, reward_funcs: Any, args: Any = None, *others: Any, **kwargs: Any) -> None:
        args = SinglePassRLOOConfig(f"{short_name(model)}-{self._name}") if args is None else args
        args = add_settings(args, SinglePassRLOOConfig)
        super().__init__(model, reward_funcs, args, *others, **kwargs)
