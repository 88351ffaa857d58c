"""A row in waves behind the face of a model: TRL's loss calls it once and never learns of waves."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.context import Tree, running_on
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Run, TreePlan
from .engines import Engine, ShardedEngine
from .loss import RouterRecorder, WaveLoss
from .plan import Ranges, Wave
from .runner import WaveRunner
from .state import select


PER_TOKEN = ("log_probs", "entropy", "is_top1", "label_mask")


class WaveModel:
    """
    Model that runs a row wave by wave and returns the outputs of TRL's fused head for the whole row.

    In training, all waves but the last have sent their gradients back when it returns; only the outputs of the last
    one carry gradients. So the backward of any loss that is a sum over tokens finishes the row.

    Args:
        engine (`Engine`):
            Calls the model.
        row (`WaveRunner`):
            The row.
        loss (`WaveLoss`):
            Loss of a wave.
        recorder (`RouterRecorder`, *optional*):
            Router logits of a mixture of experts, where its load-balancing loss is trained.
    """

    def __init__(
        self, engine: Engine, row: WaveRunner, loss: WaveLoss, recorder: RouterRecorder | None = None
    ) -> None:
        self.engine, self.row, self.loss, self.recorder = engine, row, loss, recorder

    def __call__(self, *, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        """
        Run the row.

        Args:
            fused_lm_head (`bool`, *optional*, defaults to `False`):
                Whether to return log probabilities of the labels instead of logits.
            labels (`torch.Tensor` of shape `(1, row_length)`, *optional*):
                Rolled labels.
            **inputs (`Any`):
                Other inputs of the model, for the whole row.
        """
        if not fused_lm_head:
            return self._with_logits(inputs)
        assert labels is not None, "the fused head scores labels"
        ignored = torch.full_like(labels[:, :1], IGNORE_INDEX)
        inputs = {**inputs, "shift_labels": torch.cat([labels[:, 1:], ignored], dim=1), "fused_lm_head": True}
        return self._train(inputs) if torch.is_grad_enabled() else self._evaluate(inputs)

    def _train(self, inputs: dict[str, Any]) -> Any:
        waves = self.row.plan.waves
        forwards = [wave for wave in waves if wave.handed_on or self.recorder is not None]
        padding = self.engine.padding(len(forwards), len(waves))  # before any rank runs the model
        if self.recorder is not None:
            for wave, _ in self.row.survey(lambda wave, tokens: self._remember(inputs, tokens)):
                self._count(wave, inputs)
        elif isinstance(self.engine, ShardedEngine):
            self.row.remember(lambda wave, tokens: self._remember(inputs, tokens))
        self._pad(inputs, *padding)
        parts: dict[int, Any] = {}
        passes = self.row.train(
            lambda wave, tokens: self._forward(inputs, wave, tokens),
            lambda wave, tokens: self._remember(inputs, tokens),
        )
        for wave, outputs in passes:
            loss = self.loss(wave, outputs)
            parts[wave.start] = outputs
            if wave is not self.row.last:
                self.engine.backward(loss)
                parts[wave.start] = _detached(outputs)
            elif wave.is_kept:
                self.engine.synchronise(loss)
        return _joined([parts[start] for start in sorted(parts)])

    def _evaluate(self, inputs: dict[str, Any]) -> Any:
        self._pad_evaluation(inputs)
        parts, logits = [], []
        for wave, outputs in self.row.survey(lambda wave, tokens: self.engine.inner(**self._of(inputs, tokens))):
            parts.append(outputs)
            if self.recorder is not None:
                logits.append((wave, self._count(wave, inputs)))
        assert self.loss.load_balancing is not None or not logits
        for outputs, (wave, router_logits) in zip(parts, logits, strict=False):
            outputs.aux_loss = self._share(wave, inputs, router_logits)
        return _joined(parts)

    def _pad(self, inputs: dict[str, Any], num_forwards: int, num_waves: int) -> None:
        """Run the first tokens again, without effect: ranks of an engine that shards the model meet in its layers."""
        tokens, tree = self._first_tokens()
        for _ in range(num_forwards):
            with torch.no_grad(), running_on(tree):
                self._remember(inputs, tokens)
        for _ in range(num_waves):
            with running_on(tree):
                outputs = self.engine.inner(**self._of(inputs, tokens))
            self.engine.backward(0 * outputs.log_probs.sum())

    def _pad_evaluation(self, inputs: dict[str, Any]) -> None:
        tokens, tree = self._first_tokens()
        for _ in range(self.engine.padding(len(self.row.plan.waves), 0)[0]):
            with running_on(tree):
                self.engine.inner(**self._of(inputs, tokens))

    def _first_tokens(self) -> tuple[Ranges, Tree]:
        """Two tokens, one after the other: models take a single one for a step of generation."""
        num_tokens = min(2, self.row.plan.row.length)
        depth = torch.arange(num_tokens, device=self.row.tree.depth.device)[None]
        plan = TreePlan(num_tokens, (Run(0, num_tokens, 0, ()),))
        return ((0, num_tokens),), Tree(plan, torch.full_like(depth, num_tokens), depth)

    def _with_logits(self, inputs: dict[str, Any]) -> Any:
        """Logits of the whole row, for metrics of the user's own: as large as stock's."""
        assert not torch.is_grad_enabled(), "losses that read logits are refused"
        self._pad_evaluation(inputs)
        parts = [out for _, out in self.row.survey(lambda wave, tokens: self.engine.inner(**self._of(inputs, tokens)))]
        return type(parts[0])(logits=torch.cat([part.logits for part in parts], dim=1))

    def _forward(self, inputs: dict[str, Any], wave: Wave, tokens: Ranges) -> Any:
        own = self._of(inputs, tokens)
        is_last = wave is self.row.last
        outputs = self.engine.last(is_kept=wave.is_kept, **own) if is_last else self.engine.inner(**own)
        if self.recorder is not None:
            outputs.aux_loss = self._share(wave, inputs, self.recorder.pop())
        return outputs

    def _remember(self, inputs: dict[str, Any], tokens: Ranges) -> Any:
        """Run layers for their keys and values; of the LM head, one token."""
        inputs = {name: value for name, value in inputs.items() if name not in ("shift_labels", "fused_lm_head")}
        return self.engine.inner(**self._of(inputs, tokens), logits_to_keep=1)

    def _of(self, inputs: dict[str, Any], tokens: Ranges) -> dict[str, Any]:
        shape = (1, self.row.plan.row.length)
        return {
            name: select(value, tokens) if isinstance(value, torch.Tensor) and value.shape[:2] == shape else value
            for name, value in inputs.items()
        }

    def _count(self, wave: Wave, inputs: dict[str, Any]) -> Any:
        assert self.recorder is not None
        assert self.loss.load_balancing is not None
        router_logits = self.recorder.pop()
        self.loss.load_balancing.count(router_logits, select(inputs["attention_mask"], ((wave.start, wave.end),)))
        return router_logits

    def _share(self, wave: Wave, inputs: dict[str, Any], router_logits: Any) -> torch.Tensor:
        assert self.loss.load_balancing is not None
        multiplicity = select(inputs["attention_mask"], ((wave.start, wave.end),))
        return self.loss.load_balancing.share(router_logits, multiplicity)


def _detached(outputs: Any) -> Any:
    values = {name: getattr(outputs, name) for name in (*PER_TOKEN, "aux_loss")}
    return type(outputs)(**{name: None if value is None else value.detach() for name, value in values.items()})


def _joined(parts: list[Any]) -> Any:
    """Outputs of the row, aligned with labels that are shifted by one: the last position has no target."""
    per_token = {name: torch.cat([getattr(part, name) for part in parts], dim=1)[:, :-1] for name in PER_TOKEN}
    shares = [part.aux_loss for part in parts if part.aux_loss is not None]
    return type(parts[0])(**per_token, aux_loss=torch.stack(shares).sum() if shares else None)
