"""Training steps of a conversation, with time and memory: packed N-pass, a single pass, and a single pass in waves."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from rich.table import Table
from torch.nn import functional as F

from ..attention.context import running_on
from ..cost.flops import Cost, get_model_shape, npass_cost, single_pass_cost
from ..data.collator import DataCollatorForSinglePass
from ..engine.enable import enable_tree
from ..engine.model_call import as_tree
from ..engine.wave_plan import WavePlan
from ..engine.waves import WaveRunner, select
from ..recurrent.decoder import get_decoder
from ..trees.prefix_tree import IGNORE_INDEX, PrefixTree
from ..trees.rows import Row, TreePlan
from ..trees.sample import Sample
from .npass import stopwatch


if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_CHUNK = 1024  # tokens
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
INPUTS = ("input_ids", "position_ids", "attention_mask")


class Schedule(StrEnum):
    """Ways of computing the same training step."""

    NPASS_PACKED = "npass_packed"
    """Separate samples in one row without padding, on the same kernels as a single pass."""
    SINGLE_PASS = "single_pass"
    """The samples' prefix tree in one row."""
    WAVES = "waves"
    """The same row in waves."""


def make_step(
    model: PreTrainedModel, samples: Sequence[Sample], schedule: Schedule, device: torch.device | str | None = None
) -> Callable[[], torch.Tensor]:
    """
    Return a function that runs forward and backward of one conversation, and returns its loss; targets weigh the same.

    The LM head runs on targets only, in chunks whose gradient is taken at once, so that logits cost the same in every
    schedule. Takes a model under tree attention; `device` is that of the inputs, the model's by default.
    """
    together = [samples] if schedule is not Schedule.NPASS_PACKED else [[sample] for sample in samples]
    rows = [Row.from_tree(PrefixTree.from_samples(group)).columns() for group in together]
    batch: dict[str, Any] = dict(DataCollatorForSinglePass(pad_token_id=0)(rows))
    labels = batch["labels"][0]
    shifted = F.pad(labels[1:], (0, 1), value=IGNORE_INDEX)
    step = _Step(model, send_to_device(batch, model.device if device is None else device), shifted)
    return step.in_waves if schedule is Schedule.WAVES else step.in_one_row


def measure(model: PreTrainedModel, step: Callable[[], object], repeats: int) -> tuple[list[float], int]:
    """Return the seconds of some runs of a step after a warm-up, and the bytes that they need beyond those in use."""
    step()
    before, times = reset_peak(), []
    for _ in range(repeats):
        with stopwatch(model) as seconds:
            step()
        times.append(seconds())
    used = peak() - before
    model.zero_grad()
    return times, used


@dataclass(frozen=True, slots=True)
class Timing:
    """Measured time and counted work of N-pass and the single pass on the same conversations."""

    # forward and backward of all samples, one by one: the sum over conversations of each one's median
    npass_seconds: float
    single_pass_seconds: float  # the same for the trees
    npass_cost: Cost  # counted work of all samples
    single_pass_cost: Cost  # counted work of all trees

    @property
    def speedup(self) -> float:
        """Measured seconds of N-pass ÷ those of the single pass."""
        return self.npass_seconds / self.single_pass_seconds

    @property
    def forecast(self) -> float:
        """Counted operations of N-pass ÷ those of the single pass."""
        return self.npass_cost.flops / self.single_pass_cost.flops

    def table(self) -> Table:
        """Return the timing as a table for `rich` to print."""
        table = Table(title="Forward and backward on this machine", title_justify="left", title_style="bold")
        for name in ("", "N-pass", "single pass", "N-pass ÷ single pass"):
            table.add_column(name, justify="right" if name else "left")
        npass, single = self.npass_cost, self.single_pass_cost
        table.add_row("tokens", f"{npass.tokens:,}", f"{single.tokens:,}", f"{npass.tokens / single.tokens:.2f}")
        table.add_row(
            "TFLOP, counted", *(f"{cost.flops / 1e12:.3g}" for cost in (npass, single)), f"{self.forecast:.2f}"
        )
        seconds = (self.npass_seconds, self.single_pass_seconds)
        table.add_row("seconds, measured", *(f"{value:.3g}" for value in seconds), f"{self.speedup:.2f}", style="bold")
        return table


def time_both(
    model: PreTrainedModel,
    conversations: Sequence[Sequence[Sample]],
    *,
    repeats: int = 3,
    on_step: Callable[[], object] = lambda: None,
) -> Timing:
    """
    Time N-pass, sample by sample, and the single pass on the same conversations and kernels; trees stay enabled.

    Each conversation is timed `repeats` times after one warm-up run; `on_step` is called after each run.
    """
    shape = get_model_shape(model.config)
    enable_tree(model)

    def seconds(groups: Sequence[Sequence[Sample]]) -> float:
        steps = [make_step(model, group, Schedule.SINGLE_PASS) for group in groups]

        def step() -> None:
            for run in steps:
                run()
            on_step()

        return median(measure(model, step, repeats)[0])

    return Timing(
        sum(seconds([[sample] for sample in samples]) for samples in conversations),
        sum(seconds([samples]) for samples in conversations),
        npass_cost([sample for samples in conversations for sample in samples], shape),
        single_pass_cost([PrefixTree.from_samples(samples) for samples in conversations], shape),
    )


def wave_tokens_that_keep_the_history(plan: TreePlan) -> int:
    """Return the smallest `wave_tokens` with which a history is kept beside any branch, so that nothing runs twice."""
    history = max((end for run in plan.runs for _, end in run.prefix), default=0)
    return history + max(run.end - max(run.start, history) for run in plan.runs)


class _Step:
    """Forward and backward of one row: a batch on the model's device, and on the CPU the target of each position."""

    def __init__(self, model: PreTrainedModel, batch: dict[str, Any], targets: torch.Tensor) -> None:
        self._decoder, self._head = get_decoder(model), model.get_output_embeddings()
        self._inputs = {name: batch[name] for name in INPUTS}
        self._tree = as_tree(batch["tree"])
        self._targets = targets
        self._num_targets = int((targets != IGNORE_INDEX).sum())

    def in_one_row(self) -> torch.Tensor:
        """Run the row at once."""
        with running_on(self._tree):
            hidden = self._decode(((0, self._tree.plan.length),))
        return self._backward(hidden, 0)

    def in_waves(self) -> torch.Tensor:
        """Run the row in the smallest waves that run nothing twice."""
        plan = WavePlan.from_tree_plan(self._tree.plan, wave_tokens_that_keep_the_history(self._tree.plan))
        losses = [
            self._backward(hidden, wave.start)
            for wave, hidden in WaveRunner(plan, self._tree).train(self._decode_wave, self._decode_wave)
        ]
        return torch.stack(losses).sum()

    def _decode_wave(self, wave: object, tokens: tuple[tuple[int, int], ...]) -> torch.Tensor:
        return self._decode(tokens)

    def _decode(self, tokens: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Last hidden states of some tokens of the row, of shape `(num_tokens, hidden)`."""
        inputs = {name: select(value, tokens) for name, value in self._inputs.items()}
        hidden: torch.Tensor = self._decoder(**inputs, use_cache=False)[0][0]
        return hidden

    def _backward(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """Loss of hidden states from a position of the row on, and its gradients."""
        targets = self._targets[start : start + len(hidden)]
        predicting = (targets != IGNORE_INDEX).nonzero()[:, 0]
        chosen = hidden.index_select(0, predicting.to(hidden.device))
        leaf, total = chosen.detach().requires_grad_(), chosen.new_zeros((), dtype=torch.float32)
        expected = targets[predicting].to(hidden.device)
        for first in range(0, len(leaf), HEAD_CHUNK):
            logits = self._head(leaf[first : first + HEAD_CHUNK]).float()
            loss = F.cross_entropy(logits, expected[first : first + HEAD_CHUNK], reduction="sum") / self._num_targets
            torch.autograd.backward(loss)
            total = total + loss.detach()
        torch.autograd.backward(chosen, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        return total


# Peak memory: of the GPU if PyTorch has one, of the process otherwise ------------------------------------------------


def reset_peak() -> int:
    """Forget the peak so far, and return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if _STATUS.exists():
        _CLEAR_REFS.write_text("5")
        return _status("VmRSS")
    return peak()


def peak() -> int:
    """Return the largest number of bytes in use since `reset_peak`; since the start where no system call resets it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# Conversations with the lengths of reasoning models' turns and random tokens -----------------------------------------


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths of the parts of a turn, in tokens: the smallest and the largest of each."""

    user: tuple[int, int] = (50, 100)  # user message, or the output of a tool
    reasoning: tuple[int, int] = (300, 1000)
    answer: tuple[int, int] = (100, 200)  # answer, or a tool call
    system: int = 50  # system message, once


def conversation(
    turns: int, vocabulary: int, seed: int, sizes: Sizes = Sizes(), *, keep: bool = False
) -> list[Sample]:
    """Return the samples of one conversation of random tokens; with `keep`, history keeps earlier reasoning."""
    random = np.random.default_rng(seed)
    history, samples = random.integers(vocabulary, size=sizes.system), []
    for index in range(turns):
        user, reasoning, answer = (
            random.integers(vocabulary, size=random.integers(low, high + 1))
            for low, high in (sizes.user, sizes.reasoning, sizes.answer)
        )
        history = np.concatenate([history, user])
        completion = np.concatenate([reasoning, answer])
        samples.append(Sample.from_prompt_and_completion(history, completion, index))
        history = np.concatenate([history, completion if keep else answer])
    return samples
