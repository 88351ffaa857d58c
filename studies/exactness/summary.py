"""Results by setting, arm and seed, and means over seeds with intervals."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any


# Quantiles of Student's t for two-sided 95 % intervals, by degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Record = dict[str, Any]


class Interval:
    """Mean over seeds with its 95 % interval; a single seed has no interval."""

    def __init__(self, values: Sequence[float]) -> None:
        self.mean, count = mean(values), len(values)
        self.half = T95[count - 2] * stdev(values) / count**0.5 if count > 1 else None

    def text(self, sign: str = "") -> str:
        percent = f"{100 * self.mean:{sign}.1f}"
        return percent if self.half is None else f"{percent} ± {100 * self.half:.1f}"


def load(folder: Path) -> list[Record]:
    """Read all results of a model."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def runs_by_seed(records: Sequence[Record], setting: str, arm: str) -> dict[int, Record]:
    """Return the results of one arm in one setting, by seed; the runs of the single pass count in both settings."""
    setting = "tokens" if (setting, arm) == ("flops", "single_pass") else setting
    chosen = [record for record in records if (record["plan"]["setting"], record["plan"]["arm"]) == (setting, arm)]
    return {record["plan"]["seed"]: record for record in chosen}


def later_turns(record: Record, history: str = "given") -> float:
    """Return the mean accuracy over the turns with a history."""
    return mean(record["accuracy"][history][1:])


def differences(arm: dict[int, Record], exact: dict[int, Record], value: Callable[[Record], float]) -> list[float]:
    """Return how much an arm exceeds exact training, by seed: data and initial weights are equal within a seed."""
    return [value(arm[seed]) - value(exact[seed]) for seed in arm if seed in exact]


def loss_differences(records: Sequence[Record], setting: str, arms: tuple[str, str]) -> dict[int, list[float]]:
    """Return the relative differences between the losses of two arms by step, for every seed with both."""
    first, second = (runs_by_seed(records, setting, arm) for arm in arms)
    return {
        seed: [abs(a - b) / abs(b) for a, b in zip(first[seed]["losses"], second[seed]["losses"], strict=True)]
        for seed in first
        if seed in second
    }
