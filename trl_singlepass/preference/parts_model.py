"""
Batches of several parts (rows, or waves of rows): each part runs forward first, then each forward and backward.

The loss of a pair needs the log-probabilities of all its turns, which different parts may compute. So all parts run
forward without gradients, TRL computes its loss from what they return, and the loss its derivative with respect to
each log-probability. With these as factors, each part runs forward and backward by itself: `Σ_i c_i · log p_i`, with
`c_i = ∂loss / ∂log p_i`, has the gradients of the loss. What this costs is one more forward of the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..attention.context import running_on
from ..data.collator import Batch
from ..data.row_tree import LineView
from ..engine.model_call import as_tree, in_lines, join_rows, logits_in_lines, row_inputs, shared_inputs
from ..images.reading import showing_images
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.rows import Ranges
from ..waves import Wave, WavePlan, WaveRunner, select
from ..waves.engines import Engine, ShardedEngine
from ..waves.loss import LoadBalancingLoss, RouterRecorder
from ..waves.runner import Forward


CompareLogProbs = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes the log-probabilities of a part from its first and from its second forward, each `(1, num_tokens)`."""


class PairModelInParts:
    """
    A model that takes batches of pairs and runs them part by part; its outputs are those of a call at once.

    `plans` are the waves of each row of the batch; a row that runs whole has one. `num_parts` is the largest number of
    parts that a rank has in this batch. With `offload`, what waits between waves is held on the CPU. `compare` is
    called with what each part computes at its two forwards.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        plans: Sequence[WavePlan],
        num_parts: int,
        offload: bool = False,
        recorder: RouterRecorder | None = None,
        compare: CompareLogProbs | None = None,
    ) -> None:
        self._engine, self._plans, self._offload = engine, plans, offload
        self._recorder, self._compare = recorder, compare
        own = sum(len(plan.waves) for plan in plans)
        self._num_missing = num_parts - own if isinstance(engine, ShardedEngine) else 0
        self._runs: list[_RowRun] = []
        self._leaves: list[torch.Tensor] = []
        self._load_balancing: LoadBalancingLoss | None = None

    def __call__(self, *, tree: LineView, labels: torch.Tensor | None = None, **inputs: Any) -> ModelOutput:
        """
        Run all parts forward; in training, the log-probabilities that it returns are leaves of TRL's graph.

        `labels` are the targets of the trajectories, of shape `(2B, M + 1)`, -100 where there is none. With them, this
        returns the outputs of TRL's fused head, each of shape `(2B, M)`; without, `logits` of shape
        `(2B, M + 1, vocabulary)`.
        """
        has_labels, others = labels is not None, shared_inputs(inputs)
        self._runs = [
            _RowRun(row, plan, row_inputs(row, has_labels=has_labels), others, self._offload)
            for row, plan in zip(tree.rows, self._plans, strict=True)
        ]
        if self._recorder is not None and inputs.get("output_router_logits"):
            self._load_balancing = self._recorder.new_row()
        with torch.no_grad():
            self._pad()
            outputs = join_rows([outputs for run in self._runs for outputs in self._forward(run)])
        leaves = ["log_probs"]
        if self._load_balancing is not None:
            outputs["aux_loss"] = self._load_balancing.value()
            leaves.append("aux_loss")
        if labels is None:
            outputs["logits"] = logits_in_lines(outputs, tree)
            return outputs
        if torch.is_grad_enabled():
            self._leaves = [outputs[name].requires_grad_() for name in leaves]
        # Of the leaves, which stay as they are.
        return in_lines(type(outputs)(**outputs), tree, is_padding=labels[:, 1:] == IGNORE_INDEX)

    def _forward(self, run: _RowRun) -> Iterator[ModelOutput]:
        for wave, outputs in run.forward_all(lambda wave, tokens: self._call(run, tokens)):
            if self._load_balancing is not None:
                self._load_balancing.count(self._router_logits(), run.multiplicity(wave))
            yield outputs

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """
        Run each part forward and backward.

        Takes TRL's loss of what the call returned, a scalar, and returns the same loss. Its backward is that of the
        last part; those of the others have run.
        """
        factors = torch.autograd.grad(loss, self._leaves, allow_unused=True, materialize_grads=True)
        self._pad()
        last, end = torch.zeros_like(loss), 0
        for run in self._runs:
            start, end = end, end + run.length
            log_probs, of_row = self._leaves[0].detach()[:, start:end], factors[0][:, start:end]
            is_last_row = run is self._runs[-1]
            for wave, outputs in run.train(self._forward_to_train(run, is_last_row)):
                tokens = ((wave.start, wave.end),)
                if self._compare is not None:
                    self._compare(select(log_probs, tokens), outputs.log_probs.detach())
                last = (outputs.log_probs * select(of_row, tokens)).sum()
                if self._load_balancing is not None:
                    last = last + factors[1] * self._load_balancing.share(
                        self._router_logits(), run.multiplicity(wave)
                    )
                if not (is_last_row and wave is run.waves.last):
                    self._engine.backward(last)
        return loss.detach() + (last - last.detach())

    def _forward_to_train(self, run: _RowRun, is_last_row: bool) -> Callable[[Wave, Ranges], ModelOutput]:
        def forward(wave: Wave, tokens: Ranges) -> ModelOutput:
            return self._call(run, tokens, is_last=is_last_row and wave is run.waves.last)

        return forward

    def _call(self, run: _RowRun, tokens: Ranges, *, is_last: bool = False) -> ModelOutput:
        with showing_images(run.images, run.tree.plan):
            if is_last:
                outputs: ModelOutput = self._engine.forward_last(is_kept=False, **run.select(tokens))
                return outputs
            return self._engine.forward(**run.select(tokens))

    def _router_logits(self) -> Sequence[torch.Tensor]:
        assert self._recorder is not None
        return self._recorder.pop()

    def _pad(self) -> None:
        """Run tokens again, without effect: the ranks of a sharded engine meet inside the model."""
        run = self._runs[0]
        # The first tokens, or the whole row if it needs its images.
        has_images = run.images is not None
        tokens, tree = (((0, run.length),), run.tree) if has_images else run.waves.first_tokens()
        for _ in range(self._num_missing):
            with running_on(tree):
                outputs = self._call(run, tokens)
            if not torch.is_grad_enabled():
                continue
            loss = outputs.log_probs.sum()
            if self._load_balancing is not None:  # routers have the gradients that they have in a part
                loss = loss + torch.stack([logits.sum() for logits in self._router_logits()]).sum()
            self._engine.backward(0 * loss)


class _RowRun:
    """One row while it runs: its tree, its waves, and what the model reads of it."""

    def __init__(
        self, row: Batch, plan: WavePlan, of_row: dict[str, torch.Tensor], others: dict[str, Any], offload: bool
    ) -> None:
        self.images, self.tree = row["tree"].image_features, as_tree(row["tree"])
        self.waves = WaveRunner(plan, self.tree, offload)
        self.length = self.tree.plan.length
        self._of_row, self._others = of_row, others

    def forward_all(self, forward: Forward[ModelOutput]) -> Iterator[tuple[Wave, ModelOutput]]:
        """Run the row forward, without gradients; arguments and results as of [`WaveRunner.forward_all`]."""
        if len(self.waves.plan.waves) > 1:
            yield from self.waves.forward_all(forward)
        else:
            yield self._run_whole(forward)

    def train(self, forward: Forward[ModelOutput]) -> Iterator[tuple[Wave, ModelOutput]]:
        """Run the row again, with gradients; the caller runs the backward of a wave before it asks for the next."""
        if len(self.waves.plan.waves) > 1:
            yield from self.waves.train(forward, _not_again)
        else:
            yield self._run_whole(forward)

    def _run_whole(self, forward: Forward[ModelOutput]) -> tuple[Wave, ModelOutput]:
        with running_on(self.tree):
            return self.waves.last, forward(self.waves.last, ((0, self.length),))

    def select(self, tokens: Ranges) -> dict[str, Any]:
        """Return the inputs of the model for some tokens of the row."""
        if tokens == ((0, self.length),):
            return {**self._of_row, **self._others}
        assert self.images is None, "rows with images do not run in waves"
        return {**{name: select(value, tokens) for name, value in self._of_row.items()}, **self._others}

    def multiplicity(self, wave: Wave) -> torch.Tensor:
        """Return how often N-pass runs each token of a wave, `(1, num_tokens)`."""
        return select(self._of_row["attention_mask"], ((wave.start, wave.end),))


def _not_again(wave: Wave, tokens: Ranges) -> None:
    raise AssertionError("what later waves need was stored in the first forward")
