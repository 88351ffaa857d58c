"""What the log and an evaluation report: pooled loss, counts of tokens, loss and accuracy by turn, predictions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets.utils.tqdm import tqdm
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import ModelOutput

from ..data.collator import Batch
from ..trees.prefix_tree import IGNORE_INDEX
from ..trees.sample import PARTS


TOKEN_COUNTS = "token_counts.json"  # in a checkpoint
NUM_TURNS = 16  # later turns are logged together
_LOGS_PER_TABLE = 10
# Prefixes of the names of turn metrics, with the parts of a turn (indices into `PARTS`) that each pools.
_GROUPS = {"": (0, 1, 2), "reasoning_": (0,), "answer_": (1, 2), "first_answer_token_": (1,)}


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class PooledLoss:
    """Mean loss of a dataset over all its trained tokens, whatever the batch size; sums stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=_widest_float(device), device=device)

    def add(self, loss: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a batch: its mean loss and the sum of its loss weights, both scalars."""
        weight = weight.to(self._sums)
        self._sums += torch.stack([loss.detach().to(weight) * weight, weight])

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the mean over the batches of all processes as `loss`, if there were any; every process must call."""
        loss, weight = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums.zero_()
        return {"loss": loss / weight} if weight > 0 else {}


class TokenCounts:
    """Running counts of the tokens of one process; they stay on the device until the log asks for them."""

    def __init__(self) -> None:
        self._trained: torch.Tensor | float = 0.0
        self._sample_tokens = 0
        self._row_tokens = 0

    def add(self, batches: Sequence[Batch], num_items: torch.Tensor, num_unshared: int = 0) -> None:
        """Count this process's batches of a step, the loss weights of all ranks, and tokens that run unshared."""
        self._trained = self._trained + num_items.to(_widest_float(num_items.device))
        for plan in (batch["tree"].plan for batch in batches if "tree" in batch):
            self._sample_tokens += plan.num_sample_tokens
            self._row_tokens += plan.example_ends[-1]
        self._sample_tokens += num_unshared
        self._row_tokens += num_unshared

    def pop(self) -> dict[str, float]:
        """Return the sharing factor since the last call, and the tokens trained since the start of the run."""
        if self._row_tokens == 0:
            return {}
        logs = {
            "sharing_factor": self._sample_tokens / self._row_tokens,
            "num_trained_tokens": round(float(self._trained), 4),  # weights add up in float32
        }
        self._sample_tokens = self._row_tokens = 0
        return logs

    def save(self, checkpoint: str, num_tokens: int) -> None:
        """Write the counts since the start of the run, with TRL's own, to a checkpoint."""
        counts = {"num_tokens": num_tokens, "num_trained_tokens": float(self._trained)}
        Path(checkpoint, TOKEN_COUNTS).write_text(json.dumps(counts), encoding="utf-8")

    def restore(self, checkpoint: str | None, num_tokens: int) -> int:
        """Continue the counts of a checkpoint that has some, and return TRL's; by default, those given."""
        if checkpoint is None or not (saved := Path(checkpoint, TOKEN_COUNTS)).is_file():
            return num_tokens
        counts = json.loads(saved.read_text(encoding="utf-8"))
        self._trained = counts["num_trained_tokens"]
        return int(counts["num_tokens"])


class TurnMetrics:
    """Loss and accuracy by turn and part of a turn, for `log_turn_metrics`; sums stay on the device until asked."""

    def __init__(self, device: torch.device) -> None:
        # Weight, loss and correct predictions: first of what is not a target, then turn by turn, all late turns last.
        shape = 1 + (NUM_TURNS + 1) * len(PARTS), 3
        self._sums = torch.zeros(shape, dtype=_widest_float(device), device=device)

    def add(self, outputs: ModelOutput, label_parts: torch.Tensor, loss_weights: torch.Tensor | None) -> None:
        """
        Add the losses of a row, from what TRL's fused head returns.

        With three parts to a turn, label part `1 + 3·turn + part` goes to row `1 + 3·min(turn, 16) + part` of the
        sums: part 2 of turn 1 is 6, and stays 6; part 0 of turn 20 is 61, and becomes 49. What each rolled label is
        part of ([`Sample.token_parts`]), and its weight, 1 if not given, have shape `(1, row_length)`.
        """
        code = label_parts[0, 1:] - 1
        turn = torch.div(code, len(PARTS), rounding_mode="floor").clamp(max=NUM_TURNS)
        values = (outputs.label_mask, -outputs.log_probs, outputs.is_top1)
        columns = torch.stack([value.detach().flatten().to(self._sums) for value in values], dim=-1)
        weights = 1 if loss_weights is None else loss_weights[0, 1:, None].to(self._sums)
        self._sums.index_add_(0, 1 + turn * len(PARTS) + code % len(PARTS), columns * weights)

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Return the means since the last call over all processes, each of which must call: for each trained turn and
        all of them, `turn/1/loss` and `turn/1/accuracy`, also with `_GROUPS` before the last word.
        """
        sums = accelerator.reduce(self._sums, reduction="sum")[1:].reshape(NUM_TURNS + 1, len(PARTS), 3).cpu()
        self._sums.zero_()
        names = [*(f"turn/{number}" for number in range(1, NUM_TURNS + 1)), f"turn/after_{NUM_TURNS}", "turn/all"]
        metrics: dict[str, float] = {}
        for name, by_part in zip(names, [*sums, sums.sum(0)], strict=True):
            for prefix, members in _GROUPS.items():
                weight, loss, correct = by_part[list(members)].sum(0).tolist()
                if weight > 0:
                    metrics[f"{name}/{prefix}loss"] = loss / weight
                    metrics[f"{name}/{prefix}accuracy"] = correct / weight
        return metrics


def print_by_turn(callbacks: Iterable[TrainerCallback]) -> None:
    """Let the callbacks that print logs show metrics by turn as a table, at every tenth log and every evaluation."""
    for callback in callbacks:
        if isinstance(callback, ProgressCallback | PrinterCallback):
            callback.on_log = _in_table(callback.on_log)


def _in_table(on_log: Callable[..., None]) -> Callable[..., None]:
    logs_seen = 0

    def show(args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        nonlocal logs_seen
        logs = dict(logs or {})
        by_turn = {name: logs.pop(name) for name in list(logs) if re.match("(eval_)?turn/", name)}
        on_log(args, state, control, logs=logs, **kwargs)
        is_shown = any(name.startswith("eval_") for name in by_turn) or logs_seen % _LOGS_PER_TABLE == 0
        logs_seen += bool(by_turn)
        if by_turn and is_shown and state.is_world_process_zero:
            tqdm.write(turn_table(by_turn))

    return show


def turn_table(by_turn: Mapping[str, float]) -> str:
    """Return metrics by turn as a table: a line for each turn, a column for each metric."""
    cells = {tuple(name.rsplit("/", 1)): value for name, value in by_turn.items()}
    turns, columns = (list(dict.fromkeys(parts)) for parts in zip(*cells, strict=True))
    lines = [["", *(column.replace("_", " ") for column in columns)]]
    lines += [[t, *(f"{cells[t, c]:.3f}" if (t, c) in cells else "–" for c in columns)] for t in turns]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def split_by_example(tensor: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return logits or rolled labels, `(1, row_length, …)`, with a row per example, padded as the Trainer pads."""
    ends = batch["tree"].plan.example_ends
    starts = (0, *ends[:-1])
    counts = batch["attention_mask"][0]
    parts = [tensor[0, start:end] for start, end in zip(starts, ends, strict=True) if counts[start] > 0]  # no padding
    return pad_sequence(parts, batch_first=True, padding_value=IGNORE_INDEX)
