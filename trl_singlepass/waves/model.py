"""A row in waves behind a model's interface: TRL's loss calls it once, as it would call the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..attention.context import running_on
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Ranges
from .engines import Engine, ShardedEngine
from .loss import PER_TOKEN, RouterRecorder, WaveLoss
from .plan import Wave
from .runner import WaveRunner
from .state import select


if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput  # trl>=1.16

Inputs = Mapping[str, Any]
"""Keyword arguments of the model for the whole row."""


class WaveModel:
    """
    Model that runs a row wave by wave and returns the outputs of TRL's fused head for the whole row.

    In training, all waves but the last have run their backward when it returns, so only the outputs of the last one
    carry gradients. The backward of any loss that is a sum over tokens finishes the row.

    The `recorder` gives the router logits of a mixture of experts whose load-balancing loss is trained.
    """

    def __init__(
        self, engine: Engine, runner: WaveRunner, loss: WaveLoss, recorder: RouterRecorder | None = None
    ) -> None:
        self.engine, self.runner, self.loss, self.recorder = engine, runner, loss, recorder

    def __call__(
        self, *, fused_lm_head: bool = False, labels: torch.Tensor | None = None, tree: object = None, **inputs: Any
    ) -> Any:
        """
        Run the row, on inputs for the whole row.

        With `fused_lm_head`, log probabilities of the labels are returned instead of logits. Labels are rolled, shape
        `(1, row_length)`. `tree` is not read: each wave has its own part of the tree.
        """
        if not fused_lm_head:
            return self._return_logits(inputs)
        assert labels is not None, "the fused head scores labels"
        ignored = torch.full_like(labels[:, :1], IGNORE_INDEX)
        inputs = {**inputs, "shift_labels": torch.cat([labels[:, 1:], ignored], dim=1), "fused_lm_head": True}
        return self._train(inputs) if torch.is_grad_enabled() else self._evaluate(inputs)

    def _train(self, inputs: Inputs) -> FusedCausalLMOutput:
        waves = self.runner.plan.waves
        forwards = [wave for wave in waves if wave.handed_on or self.recorder is not None]
        padding = self.engine.padding(len(forwards), len(waves))  # before any rank runs the model
        if self.recorder is not None:
            for wave, _ in self.runner.forward_all(lambda wave, tokens: self._forward_layers(inputs, tokens)):
                self._count(wave, inputs, self.recorder.pop())
        elif isinstance(self.engine, ShardedEngine):
            self.runner.store_history(lambda wave, tokens: self._forward_layers(inputs, tokens))
        self._pad(inputs, *padding)
        parts: dict[int, FusedCausalLMOutput] = {}
        waves_with_outputs = self.runner.train(
            lambda wave, tokens: self._forward_wave(inputs, wave, tokens),
            lambda wave, tokens: self._forward_layers(inputs, tokens),
        )
        for wave, outputs in waves_with_outputs:
            loss = self.loss(wave, outputs)
            parts[wave.start] = outputs
            if wave is not self.runner.last:
                self.engine.backward(loss)
                parts[wave.start] = _detach(outputs)
            elif wave.is_kept:
                self.engine.reduce_in_next_backward(loss)
        return _join([parts[start] for start in sorted(parts)])

    def _evaluate(self, inputs: Inputs) -> FusedCausalLMOutput:
        self._pad_evaluation(inputs)
        parts: list[FusedCausalLMOutput] = []
        router_logits: list[tuple[Wave, Sequence[torch.Tensor]]] = []
        for wave, outputs in self.runner.forward_all(lambda wave, tokens: self._forward(inputs, tokens)):
            parts.append(outputs)
            if self.recorder is not None:
                router_logits.append((wave, self.recorder.pop()))
                self._count(wave, inputs, router_logits[-1][1])
        for outputs, (wave, logits) in zip(parts, router_logits, strict=False):
            outputs.aux_loss = self._share(wave, inputs, logits)
        return _join(parts)

    def _pad(self, inputs: Inputs, num_forwards: int, num_waves: int) -> None:
        """Run the first tokens again, without effect: the ranks of a sharded engine meet inside the model."""
        tokens, tree = self.runner.first_tokens()
        for _ in range(num_forwards):
            with torch.no_grad(), running_on(tree):
                self._forward_layers(inputs, tokens)
        for _ in range(num_waves):
            with running_on(tree):
                outputs = self._forward(inputs, tokens)
            loss = outputs.log_probs.sum()
            if self.recorder is not None:  # routers have the gradients that they have in a wave
                loss = loss + torch.stack([logits.sum() for logits in self.recorder.pop()]).sum()
            self.engine.backward(0 * loss)

    def _pad_evaluation(self, inputs: Inputs) -> None:
        tokens, tree = self.runner.first_tokens()
        for _ in range(self.engine.padding(len(self.runner.plan.waves), 0)[0]):
            with running_on(tree):
                self._forward(inputs, tokens)

    def _return_logits(self, inputs: Inputs) -> Any:
        """Return the logits of the whole row, as large as without waves, for the user's own metrics."""
        assert not torch.is_grad_enabled(), "losses that read logits are refused"
        self._pad_evaluation(inputs)
        parts = [out for _, out in self.runner.forward_all(lambda wave, tokens: self._forward(inputs, tokens))]
        return type(parts[0])(logits=torch.cat([part.logits for part in parts], dim=1))

    def _forward_wave(self, inputs: Inputs, wave: Wave, tokens: Ranges) -> FusedCausalLMOutput:
        if wave is self.runner.last:
            outputs = self.engine.forward_last(is_kept=wave.is_kept, **self._select(inputs, tokens))
        else:
            outputs = self._forward(inputs, tokens)
        if self.recorder is not None:
            outputs.aux_loss = self._share(wave, inputs, self.recorder.pop())
        return outputs

    def _forward(self, inputs: Inputs, tokens: Ranges) -> Any:
        return self.engine.forward(**self._select(inputs, tokens))

    def _forward_layers(self, inputs: Inputs, tokens: Ranges) -> None:
        """Run the layers for what they store, and the LM head on one token only."""
        inputs = {name: value for name, value in inputs.items() if name not in ("shift_labels", "fused_lm_head")}
        self.engine.forward(**self._select(inputs, tokens), logits_to_keep=1)

    def _select(self, inputs: Inputs, tokens: Ranges) -> dict[str, Any]:
        shape = (1, self.runner.plan.row.length)
        return {
            name: select(value, tokens) if isinstance(value, torch.Tensor) and value.shape[:2] == shape else value
            for name, value in inputs.items()
        }

    def _count(self, wave: Wave, inputs: Inputs, router_logits: Sequence[torch.Tensor]) -> None:
        assert self.loss.load_balancing is not None
        self.loss.load_balancing.count(router_logits, _multiplicity(wave, inputs))

    def _share(self, wave: Wave, inputs: Inputs, router_logits: Sequence[torch.Tensor]) -> torch.Tensor:
        assert self.loss.load_balancing is not None
        return self.loss.load_balancing.share(router_logits, _multiplicity(wave, inputs))


def _multiplicity(wave: Wave, inputs: Inputs) -> torch.Tensor:
    """Return how often N-pass runs each token of a wave, which the model gets as its `attention_mask`."""
    return select(inputs["attention_mask"], ((wave.start, wave.end),))


def _detach(outputs: FusedCausalLMOutput) -> FusedCausalLMOutput:
    values = {name: getattr(outputs, name) for name in (*PER_TOKEN, "aux_loss")}
    return type(outputs)(**{name: None if value is None else value.detach() for name, value in values.items()})


def _join(parts: Sequence[FusedCausalLMOutput]) -> FusedCausalLMOutput:
    """Return the outputs of the row, aligned with labels shifted by one: the last position has no target."""
    per_token = {name: torch.cat([getattr(part, name) for part in parts], dim=1)[:, :-1] for name in PER_TOKEN}
    shares = [part.aux_loss for part in parts if part.aux_loss is not None]
    return type(parts[0])(**per_token, aux_loss=torch.stack(shares).sum() if shares else None)
