"""
Compute what 8 to 1,024 ranks lose by waiting for the slowest, for a single pass and for packed samples of N-pass.

    python -m benchmarks.balance_at_scale

Lengths are those of real conversations (files given with --data, tokenized with --tokenizer), each drawn many times,
and of random ones with log-normal reasoning.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import Qwen3Config
from trl.data_utils import pack_dataset

from benchmarks.machine import describe
from trl_singlepass import PrefixTree
from trl_singlepass.cli.loading import load_tokenizer
from trl_singlepass.data.arrow import num_attention_pairs
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.files import load_examples
from trl_singlepass.data.sampler import BalancedSampler, predicted_imbalance, row_costs
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.trees.rows import Row


RESULTS = Path(__file__).parent / "results" / "balance_at_scale.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "balance_at_scale.svg"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
ROW_TOKENS, ROWS_PER_STEP = 32768, 2
MODEL = Qwen3Config(  # Qwen3-8B
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


@dataclass(frozen=True)
class Lengths:
    """Tokens and attention pairs of the rows of several conversations, and the lengths of their samples."""

    tokens: NDArray[np.int64]
    pairs: NDArray[np.int64]
    samples: list[list[int]]

    def drawn(self, number: int, random: np.random.Generator) -> "Lengths":
        chosen = random.integers(len(self.tokens), size=number)
        return Lengths(self.tokens[chosen], self.pairs[chosen], [self.samples[i] for i in chosen])

    def describe(self) -> dict[str, Any]:
        quantiles = np.quantile(self.tokens, [0.1, 0.5, 0.9]).astype(int).tolist()
        return {
            "conversations": len(self.tokens),
            "tokens_of_row": {"mean": float(self.tokens.mean()), "p10_p50_p90": quantiles},
            "longest_row": int(self.tokens.max()),
            "longest_sample": max(map(max, self.samples)),
            "sharing_factor": sum(map(sum, self.samples)) / int(self.tokens.sum()),
        }


def read_lengths(tokenizer: str, data: Path) -> Lengths:
    """Return the lengths of the conversations in a file."""
    loaded, lengths = load_tokenizer(tokenizer), []
    for index, conversation in enumerate(load_examples(str(data))):
        samples = example_to_samples(conversation, index, loaded, RowSettings()).samples
        row = Row.from_tree(PrefixTree.from_samples(samples))
        lengths.append((len(row), num_attention_pairs(row), [len(sample) for sample in samples]))
    tokens, pairs, of_samples = zip(*lengths, strict=True)
    return Lengths(np.array(tokens), np.array(pairs), list(of_samples))


def chat_lengths(
    user: NDArray[np.int64], reasoning: NDArray[np.int64], answer: NDArray[np.int64]
) -> tuple[int, int, list[int]]:
    """Return tokens and pairs of the row of a chat whose history keeps only answers, and its samples' lengths."""
    before = np.concatenate([[0], np.cumsum(user + answer)[:-1]])  # history before each turn
    prompt, completion = before + user, reasoning + answer
    # The last answer is only on its branch; all others are in the history too.
    trunk = np.arange(prompt[-1])
    branches = [np.arange(start, start + size) for start, size in zip(prompt, completion, strict=True)]
    depths = np.concatenate([trunk, *branches])
    return len(depths), int((depths + 1).sum()), (prompt + completion).tolist()


def log_normal_lengths(number: int, random: np.random.Generator) -> Lengths:
    """Draw chats of 1 to 6 turns with reasoning of 800 tokens in the median, a tenth of it above 2,500 tokens."""
    lengths = []
    for _ in range(number):
        turns = random.integers(1, 7)
        user = random.integers(50, 101, size=turns)
        reasoning = np.minimum(random.lognormal(np.log(800), 0.9, size=turns).astype(int), 8192)
        answer = np.minimum(random.lognormal(np.log(200), 0.6, size=turns).astype(int), 2048)
        lengths.append(chat_lengths(user, reasoning, answer))
    tokens, pairs, samples = zip(*lengths, strict=True)
    return Lengths(np.array(tokens), np.array(pairs), list(samples))


def packed(lengths: NDArray[np.int64]) -> Iterator[list[int]]:
    """Pack sequences as TRL does, 1,000 at a time, and yield which sequences share a row."""
    for start in range(0, len(lengths), 1000):
        part = lengths[start : start + 1000]
        # TRL packs lists of numbers: fill each sequence with its index to recognize it afterwards.
        columns = [np.full(size, start + i, np.int32) for i, size in enumerate(part)]
        offsets = np.cumsum([0, *part]).astype(np.int32)
        table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, np.concatenate(columns))})
        together = pack_dataset(datasets.Dataset(table), ROW_TOKENS, "bfd").with_format("numpy")
        for row in together:
            first = np.concatenate([[0], np.cumsum(row["seq_lengths"])[:-1]])
            yield row["input_ids"][first].tolist()


def total_costs(tokens: NDArray[np.int64], pairs: NDArray[np.int64], rows: list[list[int]]) -> NDArray[np.float64]:
    """Return the cost of each packed row."""
    one = row_costs(tokens, pairs, MODEL)
    return np.array([one[row].sum() for row in rows])


@dataclass(frozen=True)
class Schedule:
    """Costs of the rows of one way of training, the number of rows per rank and step, and how they are assigned."""

    costs: NDArray[np.float64]
    rows_per_step: int
    order: str

    def efficiency(self, num_ranks: int) -> float:
        """Return the share of time that ranks spend working, over all steps."""
        layout = {"batch_size": 1, "num_ranks": num_ranks, "num_accumulated": self.rows_per_step}
        sampler = BalancedSampler(self.costs, seed=0, epoch=lambda: 0, group_by_cost=self.order == "grouped", **layout)
        order = sampler.order(0, balanced=self.order != "as they come")
        return 1 / (1 + predicted_imbalance(order, self.costs, **layout))


def make_schedules(lengths: Lengths, rank_steps: int, random: np.random.Generator) -> dict[str, Schedule]:
    """Return all schedules for the same conversations, as many as all ranks train in some number of steps."""
    rows_per_step = max(round(ROW_TOKENS * ROWS_PER_STEP / lengths.tokens.mean()), 1)
    drawn = lengths.drawn(rows_per_step * rank_steps, random)
    costs = row_costs(drawn.tokens, drawn.pairs, MODEL)
    samples = np.concatenate(drawn.samples)
    of_rows = total_costs(drawn.tokens, drawn.pairs, list(packed(drawn.tokens)))
    of_samples = total_costs(samples, samples * (samples + 1) // 2, list(packed(samples)))
    return {
        "as they come": Schedule(costs, rows_per_step, "as they come"),
        "balanced": Schedule(costs, rows_per_step, "balanced"),
        "packed": Schedule(of_rows, ROWS_PER_STEP, "balanced"),
        "N-pass": Schedule(of_samples, ROWS_PER_STEP, "as they come"),
    }


def measure(lengths: Lengths, rank_steps: int, random: np.random.Generator) -> dict[str, Any]:
    """Return the efficiency of every schedule by number of ranks, and its speed relative to N-pass."""
    schedules = make_schedules(lengths, rank_steps, random)
    ranks = [number for number in RANKS if 2 * number <= rank_steps]
    efficiency = {name: [schedule.efficiency(number) for number in ranks] for name, schedule in schedules.items()}
    speed = {
        name: [
            one / schedule.costs.sum() * schedules["N-pass"].costs.sum() / of_npass
            for one, of_npass in zip(efficiency[name], efficiency["N-pass"], strict=True)
        ]
        for name, schedule in schedules.items()
    }
    return {
        "lengths": lengths.describe(),
        "rows_per_rank_and_step": {name: schedule.rows_per_step for name, schedule in schedules.items()},
        "ranks": ranks,
        "efficiency": efficiency,
        "speed": speed,
    }


def by_rows_per_step(lengths: Lengths, num_ranks: int, random: np.random.Generator) -> dict[str, Any]:
    """Return the efficiency by conversations per rank and step: with fewer, there is less to balance."""
    numbers = [1, 2, 4, 8, 16]
    drawn = lengths.drawn(max(numbers) * num_ranks * 8, random)
    costs = row_costs(drawn.tokens, drawn.pairs, MODEL)
    orders = ("as they come", "balanced", "grouped")
    efficiency = {
        order: [Schedule(costs, number, order).efficiency(num_ranks) for number in numbers] for order in orders
    }
    return {"ranks": num_ranks, "rows_per_rank_and_step": numbers, "efficiency": efficiency}


STYLES = {
    "packed": ("single pass, packed, balanced", "#1b6ca8", "o"),
    "balanced": ("single pass, balanced", "#2a9d6f", "s"),
    "as they come": ("single pass, as rows come", "#8a94a0", "v"),
    "N-pass": ("N-pass, packed by TRL (bfd)", "#d1495b", "D"),
}


def draw(datasets_measured: dict[str, Any], path: Path) -> None:
    """Plot efficiency above and speed below, with one column per set of conversations."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "balance", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(datasets_measured), figsize=(3.3 * len(datasets_measured), 6), sharex=True, squeeze=False
    )
    for (name, measured), (above, below) in zip(datasets_measured.items(), axes.T, strict=True):
        above.set_title(f"{name}\nN-pass: {measured['lengths']['sharing_factor']:.1f} times the tokens", fontsize=9)
        for schedule, (label, color, marker) in STYLES.items():
            style = {"label": label, "color": color, "marker": marker, "markersize": 4, "linewidth": 1.4}
            above.plot(measured["ranks"], [100 * value for value in measured["efficiency"][schedule]], **style)
            below.plot(measured["ranks"], measured["speed"][schedule], **style)
        below.set_xscale("log", base=2)
        below.set_xticks(measured["ranks"], [str(number) for number in measured["ranks"]], rotation=45)
        below.set_xlabel("ranks")
        above.set_ylim(50, 102)
        below.set_ylim(0, 1.15 * max(map(max, measured["speed"].values())))
        for one in (above, below):
            one.grid(color="#e3e7eb")
    axes[0][0].set_ylabel("time that is work, %")
    axes[1][0].set_ylabel("speed, N-pass packed = 1")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="files of conversations")
    parser.add_argument("--tokenizer", default="Qwen/Qwen3-0.6B", help="path or Hub id of a tokenizer")
    parser.add_argument("--rank-steps", type=int, default=2 * RANKS[-1], help="ranks × steps of every simulation")
    parser.add_argument("--redraw", action="store_true", help="only redraw the picture from the results")
    arguments = parser.parse_args()
    if arguments.redraw:
        draw(json.loads(RESULTS.read_text())["datasets"], PICTURE)
        return
    random = np.random.default_rng(0)
    datasets.disable_progress_bars()
    lengths = {path.stem: read_lengths(arguments.tokenizer, path) for path in arguments.data}
    lengths["log-normal reasoning"] = log_normal_lengths(20_000, random)
    measured = {name: measure(one, arguments.rank_steps, random) for name, one in lengths.items()}
    few = [by_rows_per_step(lengths["log-normal reasoning"], ranks, random) for ranks in (8, 64, 512)]
    setting = {"row_tokens": ROW_TOKENS, "packed_rows_per_step": ROWS_PER_STEP, "rank_steps": arguments.rank_steps}
    RESULTS.write_text(
        json.dumps(
            {**describe("cpu", "balance_at_scale"), **setting, "datasets": measured, "by_rows_per_step": few}, indent=1
        )
        + "\n"
    )
    draw(measured, PICTURE)


if __name__ == "__main__":
    main()
