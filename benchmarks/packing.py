"""
Measure time and memory of packing many conversations into rows, from disk to disk, in one process.

    python -m benchmarks.packing --conversations 100000
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from benchmarks.machine import anonymous_bytes, describe
from trl_singlepass import PrefixTree, Sample
from trl_singlepass.data.arrow import row_features, to_table
from trl_singlepass.data.packing import pack_dataset
from trl_singlepass.data.report import PackingReport, Report
from trl_singlepass.data.rows import PreparedRow
from trl_singlepass.trees.rows import Row


RESULTS = Path(__file__).parent / "results" / "packing.json"
VOCABULARY = 150_000
AT_ONCE = 100


def conversation(random: np.random.Generator, system: np.ndarray) -> list[Sample]:
    """Return the samples of a chat of 1 to 5 turns whose template drops the reasoning of earlier turns."""
    history, samples = system, []
    for index in range(random.integers(1, 6)):
        user, reasoning, answer = (
            random.integers(VOCABULARY, size=random.integers(*sizes)) for sizes in ((15, 60), (50, 300), (30, 100))
        )
        history = np.concatenate([history, user])
        samples.append(Sample.from_prompt_and_completion(history, np.concatenate([reasoning, answer]), index))
        history = np.concatenate([history, answer])
    return samples


def write_rows(path: Path, num_conversations: int, num_systems: int) -> tuple[datasets.Dataset, Report]:
    """Write prepared conversations, each with one of a few system prompts of 100 to 800 tokens, and count tokens."""
    random = np.random.default_rng(0)
    systems = [random.integers(VOCABULARY, size=random.integers(100, 800)) for _ in range(num_systems)]
    features, report = row_features(), Report("conversations", None)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for _ in range(0, num_conversations, AT_ONCE):
            chats = [conversation(random, systems[random.integers(num_systems)]) for _ in range(AT_ONCE)]
            trees = list(map(PrefixTree.from_samples, chats))
            rows = [
                PreparedRow(
                    Row.from_tree(tree),
                    {"num_row_tokens": len(tree), "num_sample_tokens": tree.num_sample_tokens},
                )
                for tree in trees
            ]
            report = report.with_rows(rows)
            writer.write_table(to_table(rows, features))
    return datasets.Dataset.from_file(str(path)), report


class PeakMemory:
    """Peak bytes of this process that are not backed by a file, above what it held at the start."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, anonymous_bytes())


def measure(num_conversations: int, num_systems: int, max_row_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows, prepared = write_rows(Path(folder) / "rows.arrow", num_conversations, num_systems)
        with PeakMemory() as memory:
            wall, processor = time.perf_counter(), time.process_time()
            packed = pack_dataset(rows, max_row_tokens)
            processor, wall = time.process_time() - processor, time.perf_counter() - wall
        report = PackingReport.from_rows(packed, max_row_tokens, prepared)
        return {
            "conversations": num_conversations,
            "system_prompts": num_systems,
            "max_row_tokens": max_row_tokens,
            "conversation_tokens": report.num_unpacked_tokens,
            "rows": report.num_rows,
            "row_tokens": report.num_row_tokens,
            "fill_rate": report.fill_rate,
            "sharing_within": report.sharing_within,
            "sharing_across": report.sharing_across,
            "seconds": wall,
            "processor_seconds": processor,
            "bytes_on_disk": sum(Path(file["filename"]).stat().st_size for file in rows.cache_files),
            "peak_memory_bytes": memory.peak - memory.start,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--system-prompts", type=int, default=50)
    parser.add_argument("--max-row-tokens", type=int, default=32768)
    parser.add_argument("--dry-run", action="store_true", help="print the result instead of writing it")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    result = measure(arguments.conversations, arguments.system_prompts, arguments.max_row_tokens)
    print(json.dumps(result, indent=2))
    if not arguments.dry_run:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**describe("cpu", "packing"), "results": [result]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
