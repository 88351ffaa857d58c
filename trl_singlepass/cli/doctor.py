"""The command `doctor`: what is installed on this machine, and whether and how fast it trains a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets.utils.tqdm import tqdm
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, logging

from .arguments import DoctorArguments
from .loading import load_config, load_tokenizer


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..reference.doctor import Subject


def doctor(args: DoctorArguments, console: Console) -> int:
    """Report what is installed, which kernel runs, whether it is right and how fast; 1 if something is wrong."""
    from ..reference.doctor import Subject, examine
    from ..reference.doctor.table import render_report

    turns = _read_turns(args.turns)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    subject = Subject.built_in(device) if args.model is None else _subject(args.model, device, args)
    with tqdm(total=3 + 3 * len(turns), desc="Doctor", unit=" parts") as bar:

        def on_part(what: str) -> None:
            bar.set_description(what)
            bar.update()

        report = examine(subject, device, attn_implementation=args.attn_implementation, turns=turns, on_part=on_part)
    text = json.dumps(report.to_dict(), indent=2) + "\n"
    if args.json == "-":
        console.file.write(text)
        return 0 if report.ok else 1
    console.print(render_report(report))
    if args.json is not None:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        console.print(Text(f"Wrote {path}"))
    return 0 if report.ok else 1


def _subject(model: str, device: torch.device, args: DoctorArguments) -> Subject:
    from ..reference.doctor import Subject

    def load(config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
        with _quiet_loading():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=args.trust_remote_code,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise ValueError(f"{model} has no weights for {', '.join(sorted(info['missing_keys'])[:4])}.")
        return loaded.to(device)

    config = load_config(model, trust_remote_code=args.trust_remote_code)
    if config is None:
        raise ValueError(f"{model} has no config.json. Expected a folder with a model, or the id of one on the Hub.")
    return Subject(model, config, load_tokenizer(model, trust_remote_code=args.trust_remote_code), load)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide transformers' table of the weights that are not loaded: those of the other layers."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read_turns(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--turns takes numbers of turns with commas between them, such as 2,8,16, got {text!r}.")
    return [int(part) for part in parts]
