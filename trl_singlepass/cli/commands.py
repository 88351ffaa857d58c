"""The commands that report on a model and data: `inspect`, `audit`, `verify` and `bench`, `doctor` and `chat`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets.utils.tqdm import tqdm
from rich.console import Console
from rich.text import Text
from transformers import ProcessorMixin, TextStreamer

from ..data.bad_rows import count_of
from ..data.files import load_examples
from ..data.images import holds_images
from ..data.pairs import example_to_pair, example_to_turns, is_pair
from ..data.reader import get_tokenizer
from ..data.settings import PairSettings
from ..images.loading import image_loader_of
from ..rendering.conversation import Conversation, Message
from ..rendering.history import render_with_history
from ..rendering.reasoning import THINK, reasoning_tags
from .loading import load_config, load_model, load_slice, load_tokenizer, pick_device


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..reference.doctor import DoctorReport
    from ..reports.audit import AuditReport


def inspect(args: Namespace, console: Console) -> int:
    """Show one conversation as its tree."""
    from ..reports.inspection import Inspection, render_inspection

    tokenizer, examples = _load_both(args)
    if not 0 <= args.row < len(examples):
        raise ValueError(f"--row {args.row}: {args.data} has {count_of(len(examples), 'row')}, counted from 0.")
    example = dict(examples[args.row])
    num_chosen: int | None = None
    if is_pair(example):
        pair = example_to_pair(example, args.row, tokenizer, PairSettings())
        samples, num_chosen = pair.samples, len(pair.chosen.samples)
    else:
        samples = example_to_turns(example, args.row, tokenizer)
    if not samples:
        raise ValueError(f"Row {args.row}: all its turns have the weight 0, so nothing of it is trained.")
    tokenizer = get_tokenizer(tokenizer)
    inspection = Inspection.from_samples(samples, tokenizer, num_chosen)
    console.print(render_inspection(inspection))
    if args.html is not None:
        from ..reports.pages import inspection_page

        title = f"{Path(args.data).name}, row {args.row}, {Path(args.model).name}"
        _write(args.html, inspection_page(inspection, title), console)
    if args.png is not None:
        from ..reports.tree_plots import plot_mask, plot_tree

        mask = Path(args.png).with_stem(f"{Path(args.png).stem}-mask")
        mask.parent.mkdir(parents=True, exist_ok=True)
        for path, plot in ((Path(args.png), plot_tree), (mask, plot_mask)):
            plot(inspection.tree, tokenizer).savefig(path, dpi=160)
            console.print(Text(f"Wrote {path}"))
    return 0


def audit(args: Namespace, console: Console) -> int:
    """Report what the data contains, and what training costs; the exit code is 1 if no row can be trained."""
    from ..reports.audit import audit as audit_dataset

    tokenizer, examples = _load_both(args)
    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    report = audit_dataset(
        examples,
        tokenizer,
        config,
        sample_size=args.sample_size,
        seed=args.seed,
        max_length=args.max_length,
        num_proc=args.num_proc,
    )
    _show(report, args.json, console)
    if args.html is not None and args.json != "-":
        from ..reports.pages import audit_page

        _write(args.html, audit_page(report, f"Audit of {Path(args.data).name} for {Path(args.model).name}"), console)
    return 0 if report.num_trainable else 1


def verify(args: Namespace, console: Console) -> int:
    """Compare the single pass with N-pass; the exit code is 1 if they differ."""
    from ..reference.verification import read_samples, verify_samples

    tokenizer, examples = _load_both(args)
    rows = read_samples(examples, tokenizer, max_rows=_at_least_one(args.num_rows, "-n"))
    model = _load_model(args, reads_images=isinstance(tokenizer, ProcessorMixin))
    report = verify_samples(model, rows, max_tokens=args.max_tokens, load_images=image_loader_of(tokenizer))
    console.print(Text(str(report).rstrip()))
    return 0 if report.ok else 1


def bench(args: Namespace, console: Console) -> int:
    """Time N-pass and the single pass on this machine, next to the forecast."""
    from ..reference.timing import time_both
    from ..reference.verification import read_samples

    tokenizer, examples = _load_tokenizer(args), _load_examples(args)
    rows = read_samples(examples, tokenizer, max_rows=_at_least_one(args.num_rows, "-n"))
    conversations = list(filter(None, rows))
    model, repeats = _load_model(args), _at_least_one(args.repeats, "--repeats")
    with tqdm(total=2 * len(conversations) * (repeats + 1), desc="Timing", unit=" runs") as bar:
        timing = time_both(model, conversations, repeats=repeats, on_step=bar.update)
    console.print(timing.table())
    console.print(
        f"{count_of(len(conversations), 'conversation')}, {count_of(sum(map(len, conversations)), 'turn')}, "
        f"{args.dtype} on {model.device}. "
        f"Speed-up: {timing.forecast:.2f} by counted work, {timing.speedup:.2f} measured."
    )
    return 0


def doctor(args: Namespace, console: Console) -> int:
    """Report what is installed, which kernel runs, whether it is right and how fast; 1 if something is wrong."""
    from ..reference.doctor import Subject, examine

    parts = [part.strip() for part in args.turns.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--turns takes numbers of turns with commas between them, such as 2,8,16, got {args.turns!r}."
        )
    turns = list(map(int, parts))
    device = pick_device(args.device)
    if args.model is None:
        subject = Subject.built_in(device)
    else:
        config = load_config(args.model, trust_remote_code=args.trust_remote_code)
        if config is None:
            raise ValueError(f"{args.model} has no config.json. Expected a folder with a model, or its id on the Hub.")
        load = partial(load_slice, args.model, device, trust_remote_code=args.trust_remote_code)
        subject = Subject(args.model, config, load)
    with tqdm(total=3 + 3 * len(turns), desc="Doctor", unit=" parts") as bar:

        def on_part(what: str) -> None:
            bar.set_description(what)
            bar.update()

        report = examine(subject, device, attn_implementation=args.attn_implementation, turns=turns, on_part=on_part)
    _show(report, args.json, console)
    return 0 if report.ok else 1


def chat(args: Namespace, console: Console) -> int:
    """Answer each line of the standard input until it ends."""
    tokenizer, model = get_tokenizer(_load_tokenizer(args)), _load_model(args).eval()
    messages: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    for said in _read_lines(console):
        messages.append({"role": "user", "content": said})
        messages.append(answer(messages, model, tokenizer, args.history, args.max_new_tokens))
    return 0


def _load_both(
    args: Namespace,
) -> tuple[PreTrainedTokenizerBase | ProcessorMixin, Sequence[Mapping[str, object]] | Dataset]:
    """Return the data, and the tokenizer that reads it, or the processor if there are images."""
    examples = _load_examples(args)
    return _load_tokenizer(args, reads_images=holds_images(examples)), examples


def _load_tokenizer(args: Namespace, **options: bool) -> PreTrainedTokenizerBase | ProcessorMixin:
    return load_tokenizer(
        args.model, chat_template=args.chat_template, trust_remote_code=args.trust_remote_code, **options
    )


def _load_examples(args: Namespace) -> Sequence[Mapping[str, object]] | Dataset:
    return load_examples(args.data, split=args.split, config=args.dataset_config)


def _load_model(args: Namespace, *, reads_images: bool = False) -> PreTrainedModel:
    return load_model(
        args.model,
        reads_images=reads_images,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )


def _at_least_one(number: int, name: str) -> int:
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {number}.")
    return number


def _show(report: AuditReport | DoctorReport, json_file: str | None, console: Console) -> None:
    """Print a report, and write it to a file if one is given; `-` prints it as JSON and nothing else."""
    text = json.dumps(report.to_dict(), indent=2) + "\n"
    if json_file == "-":
        console.file.write(text)
        return
    console.print(report)
    if json_file is not None:
        _write(json_file, text, console)


def _write(path: str, text: str, console: Console) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, "utf-8")
    console.print(Text(f"Wrote {path}"))


# A conversation with a model -----------------------------------------------------------------------------------------


def _read_lines(console: Console) -> Iterator[str]:
    asks = sys.stdin.isatty()
    if asks:
        console.print(Text("Ctrl-D ends the conversation.", style="dim"))
    while True:
        try:
            said = input("> " if asks else "")
        except EOFError:
            return
        if said.strip():
            yield said


def answer(
    messages: list[Message],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    history: str,
    max_new_tokens: int,
) -> Message:
    """Generate the reply to a conversation under a setting of `history`, print it as it comes, and return it."""
    # Training renders a turn with its completion; of this one, only the prompt is used.
    placeholder: Message = {"role": "assistant", "content": "Yes."}
    conversation = Conversation([*messages, placeholder], first_trained=len(messages))
    (sample,) = render_with_history(conversation, tokenizer, history)
    prompt, completion = sample.token_ids[: sample.prompt_length].tolist(), sample.token_ids[sample.prompt_length :]
    stops = {*completion.tolist()[-2:]} & {*tokenizer.all_special_ids}  # white space may follow the stop token
    given = model.generation_config.eos_token_id
    ends = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id} - {None}
    ids_BL = torch.tensor([prompt], device=model.device)
    generated = model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops | ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )[0, len(prompt) :].tolist()
    written = generated[:-1] if generated and generated[-1] in stops else generated
    return to_message(tokenizer.decode(written), tokenizer.decode(prompt), tokenizer.get_chat_template())


def to_message(text: str, prompt: str, chat_template: str) -> Message:
    """Return what a model wrote after `prompt`, without its stop token, as a message; cut reasoning has no answer."""
    tags = reasoning_tags(chat_template) or THINK
    opened = prompt.rstrip().endswith(tags.opening) or text.lstrip().startswith(tags.opening)
    reasoning, closed, content = text.partition(tags.closing)
    if not (opened or closed):
        return {"role": "assistant", "content": text}
    reasoning = reasoning.lstrip().removeprefix(tags.opening).strip("\n")
    return {"role": "assistant", "reasoning_content": reasoning, "content": content.lstrip("\n")}
