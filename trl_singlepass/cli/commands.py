"""The commands that look at a model and data: `inspect`, `audit`, `verify` and `bench`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets.utils.tqdm import tqdm
from rich.console import Console
from rich.text import Text

from ..data.bad_rows import read_all
from ..data.conversations import example_to_samples
from ..data.files import load_examples
from ..data.settings import RowSettings
from ..trees.sample import Sample
from .loading import load_config, load_model, load_tokenizer


@dataclass
class DataArguments:
    """Where the conversations are, and how they are rendered."""

    split: str = field(default="train", metadata={"help": "Split of a folder or of a dataset of the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a chat template to use instead of the tokenizer's own."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with the model may run on this machine."}
    )
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})


@dataclass
class ModelArguments:
    """How the model is loaded."""

    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the weights.", "choices": ["float64", "float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel of the model."})
    device: str | None = field(default=None, metadata={"help": "Device; a GPU if there is one."})


@dataclass
class InspectArguments(DataArguments):
    """Arguments of `inspect`."""

    row: int = field(default=0, metadata={"help": "Position of the conversation."})
    html: str | None = field(default=None, metadata={"help": "Write a page with tokens, tree and mask to this file."})
    png: str | None = field(
        default=None, metadata={"help": "Write a picture of the tree to this file, one of the mask beside it."}
    )


@dataclass
class AuditArguments(DataArguments):
    """Arguments of `audit`."""

    sample_size: int | None = field(
        default=None, metadata={"help": "Rows to look at, drawn at random. 500 by default."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draw."})
    max_length: int | None = field(default=None, metadata={"help": "Length in tokens to compare samples with."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that look at the rows."})
    json: str | None = field(default=None, metadata={"help": "Write the report as JSON to this file, or '-'."})
    html: str | None = field(default=None, metadata={"help": "Write the report as a page with plots to this file."})


@dataclass
class VerifyArguments(ModelArguments, DataArguments):
    """Arguments of `verify`."""

    num_rows: int = field(default=4, metadata={"aliases": ["-n"], "help": "Conversations to check, from the first."})
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of separate samples to check of each conversation: its first turns that fit."},
    )


@dataclass
class BenchArguments(ModelArguments, DataArguments):
    """Arguments of `bench`."""

    num_rows: int = field(default=4, metadata={"aliases": ["-n"], "help": "Conversations to time, from the first."})
    repeats: int = field(default=3, metadata={"help": "Timed runs of each conversation, after one to warm up."})


def inspect(model: str, data: str, args: InspectArguments, console: Console) -> int:
    """Show one conversation as its tree."""
    from ..reports.inspection import Inspection, render_inspection

    tokenizer, rows = _tokenizer(model, args), _rows(data, args)
    samples = example_to_samples(_row(rows, args.row, data), args.row, tokenizer, RowSettings()).samples
    if not samples:
        raise ValueError(f"Row {args.row}: all its turns have the weight 0, so nothing of it is trained.")
    inspection = Inspection.from_samples(samples, tokenizer)
    console.print(render_inspection(inspection))
    if args.html is not None:
        from ..reports.html import inspection_page

        _write(
            args.html, inspection_page(inspection, f"{Path(data).name}, row {args.row}, {Path(model).name}"), console
        )
    if args.png is not None:
        from ..reports.tree_plots import plot_mask, plot_tree

        mask = Path(args.png).with_stem(f"{Path(args.png).stem}-mask")
        mask.parent.mkdir(parents=True, exist_ok=True)
        for path, plot in ((Path(args.png), plot_tree), (mask, plot_mask)):
            plot(inspection.tree, tokenizer).savefig(path, dpi=160)
            console.print(Text(f"Wrote {path}"))
    return 0


def audit(model: str, data: str, args: AuditArguments, console: Console) -> int:
    """Report what the data holds, what the template drops, and what training costs."""
    from ..reports.audit import audit as audit_dataset
    from ..reports.audit.table import render_report

    tokenizer, rows = _tokenizer(model, args), _rows(data, args)
    config = load_config(model, trust_remote_code=args.trust_remote_code)
    report = audit_dataset(
        rows,
        tokenizer,
        config,
        sample_size=args.sample_size,
        seed=args.seed,
        max_length=args.max_length,
        num_proc=args.num_proc,
    )
    if args.json == "-":
        console.file.write(json.dumps(report.to_dict(), indent=2) + "\n")
        return 0
    console.print(render_report(report))
    if args.json is not None:
        _write(args.json, json.dumps(report.to_dict(), indent=2) + "\n", console)
    if args.html is not None:
        from ..reports.html import audit_page

        _write(args.html, audit_page(report, f"Audit of {Path(data).name} for {Path(model).name}"), console)
    return 0


def verify(model: str, data: str, args: VerifyArguments, console: Console) -> int:
    """Compare the single pass with N-pass; 1 if they disagree."""
    from ..reference import verify as verify_model

    tokenizer, rows = _tokenizer(model, args), _rows(data, args)
    first = list(islice(rows, _at_least_one(args.num_rows, "-n")))
    _samples(first, tokenizer)  # names bad rows before a model is loaded
    report = verify_model(_model(model, args), tokenizer, first, max_tokens=args.max_tokens)
    console.print(Text(str(report).rstrip()))
    return 0 if report.ok else 1


def bench(model: str, data: str, args: BenchArguments, console: Console) -> int:
    """Time both ways on this machine, with the forecast beside it."""
    from ..reference.timing import time_both

    tokenizer, rows = _tokenizer(model, args), _rows(data, args)
    first = list(islice(rows, _at_least_one(args.num_rows, "-n")))
    conversations = [samples for samples in _samples(first, tokenizer) if samples]
    loaded, repeats = _model(model, args), _at_least_one(args.repeats, "--repeats")
    with tqdm(total=2 * len(conversations) * (repeats + 1), desc="Timing", unit=" runs") as bar:
        timing = time_both(loaded, conversations, repeats=repeats, on_step=bar.update)
    console.print(timing.table())
    console.print(
        f"{len(conversations)} conversations, {sum(map(len, conversations))} turns, {args.dtype} on {loaded.device}. "
        f"Counted work says {timing.forecast:.2f}, this machine {timing.speedup:.2f}."
    )
    return 0


def _tokenizer(model: str, args: DataArguments) -> Any:
    return load_tokenizer(model, chat_template=args.chat_template, trust_remote_code=args.trust_remote_code)


def _rows(data: str, args: DataArguments) -> Any:
    return load_examples(data, split=args.split, config=args.dataset_config)


def _model(model: str, args: Any) -> Any:
    return load_model(
        model,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        trust_remote_code=args.trust_remote_code,
    )


def _samples(rows: Sequence[Any], tokenizer: Any) -> list[tuple[Sample, ...]]:
    def read(index: int, row: Any) -> tuple[Sample, ...]:
        return example_to_samples(row, index, tokenizer, RowSettings()).samples

    return read_all(rows, read, "given")


def _row(rows: Sequence[Any], index: int, data: str) -> dict[str, Any]:
    if not 0 <= index < len(rows):
        raise ValueError(f"--row {index}: {data} has {len(rows)} rows, counted from 0.")
    return dict(rows[index])


def _at_least_one(number: int, name: str) -> int:
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {number}.")
    return number


def _write(path: str, text: str, console: Console) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, "utf-8")
    console.print(Text(f"Wrote {path}"))
