"""`trl-singlepass doctor`: whether this machine trains a model right, how fast, and on which kernel."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from ..attention.registry import TREE_ATTENTION, describe_tree_attention, set_text_attention, tree_attention_name
from ..cost.flops import ModelShape, get_model_shape, npass_cost, single_pass_cost
from ..cost.memory import ActivationBytes
from ..engine.check.tree_check import TreeCheckReport
from ..engine.enable import enable_tree
from ..engine.pieces import free_bytes
from ..trees.prefix_tree import PrefixTree
from ..trees.sample import Sample
from .environment import Environment, faster_kernel
from .timing import Schedule, Sizes, conversation, make_step, measure
from .verification import verify_samples


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# A CPU would take minutes for the lengths of real turns.
SIZES_ON_CPU = Sizes(user=(4, 8), reasoning=(20, 60), answer=(6, 12), system=5)
FULL_PRECISION = ("sdpa", "eager", "flex_attention")
"""Attention that computes in float32; flash kernels are for half precision only."""
SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 65536}
BUILT_IN_ON_GPU = {**SHAPE, "vocab_size": 32000, "hidden_size": 1024, "head_dim": 128, "intermediate_size": 3072}
BUILT_IN_ON_CPU = {**SHAPE, "vocab_size": 1000, "hidden_size": 128, "head_dim": 16, "intermediate_size": 384}
# `verify` in float32: the weights, a second copy of them and three sets of gradients.
BYTES_PER_PARAMETER = 5 * 4
SHARE_OF_FREE_MEMORY = 0.7
MOST_LAYERS_ON_CPU = 4
NAMES = {"npass_packed": "N-pass, packed", "single_pass": "single pass", "waves": "single pass in waves"}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to look at."""

    name: str  # folder or hub id
    config: PreTrainedConfig  # of the whole model
    # returns the model for a configuration (of the first layers), a dtype and an `attn_implementation`
    load: Callable[[PreTrainedConfig, torch.dtype, str | None], PreTrainedModel]

    @classmethod
    def built_in(cls, device: torch.device) -> Subject:
        """Return a small Qwen3 with random weights, in a size that suits the device."""
        config = Qwen3Config(**(BUILT_IN_ON_GPU if device.type == "cuda" else BUILT_IN_ON_CPU))

        def load(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
            set_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
            return model.to(device)

        return cls("built-in", config, load)


def examine(
    subject: Subject,
    device: torch.device,
    *,
    attn_implementation: str | None = None,
    turns: Sequence[int] = (2, 8, 16),
    on_part: Callable[[str], object] = lambda what: None,
) -> DoctorReport:
    """
    Look at this machine with a model: what is installed, whether training is right, and how fast it is.

    An error in one part is noted, and the next part runs. If not even a slice of the model fits, this raises
    `ValueError`. `turns` are lengths of conversations.
    """
    sizes = Sizes() if device.type == "cuda" else SIZES_ON_CPU
    text_config = subject.config.get_text_config()
    vocabulary = min(int(text_config.vocab_size), 30_000)
    conversations = [conversation(length, vocabulary, length, sizes) for length in turns]
    num_layers = layers_that_fit(subject.config, max(sum(map(len, samples)) for samples in conversations), device)
    config = slice_config(subject.config, num_layers)
    verified = []
    for dtype in (torch.bfloat16, torch.float32):
        on_part(f"verify in {_name(dtype)}")
        verified.append(_verify(subject, config, dtype, attn_implementation, vocabulary))
        _collect()
    on_part("load the model to time it")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = subject.load(config, dtype, attn_implementation).train()
    implementation = str(model.config.get_text_config()._attn_implementation)  # before trees are enabled
    enable_tree(model)
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        shape = get_model_shape(config)
    except ValueError:  # its operations cannot be counted
        shape = None
    measured = [one for samples in conversations for one in _measure(model, samples, implementation, shape, on_part)]
    environment = Environment.detect()
    has_choice = not getattr(model, "_compatible_flash_implementations", None)  # transformers replaces any other
    kernel = Kernel(
        implementation,
        tree_attention_name(implementation),
        describe_tree_attention(implementation, config, device, dtype),
        faster_kernel(implementation, environment.gpus, environment.packages) if has_choice else None,
    )
    examined = Examined(subject.name, type(model).__name__, num_layers, text_config.num_hidden_layers, str(device))
    return DoctorReport(environment, examined, kernel, tuple(verified), tuple(measured))


def _verify(
    subject: Subject, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, vocabulary: int
) -> Verified:
    if dtype is torch.float32 and attention is not None and attention not in FULL_PRECISION:
        attention = "sdpa"
    name = attention or "default"
    samples = [conversation(turns, vocabulary, turns, SIZES_ON_CPU) for turns in (1, 2, 4)]
    try:
        model = subject.load(config, dtype, attention)
        name = str(model.config.get_text_config()._attn_implementation)
        report = verify_samples(model, samples)
    except Exception as error:  # whatever a kernel raises is what the reader wants to know
        return Verified(_name(dtype), name, ok=False, found=_line(error), check=None)
    return Verified(_name(dtype), name, report.ok, report.verdict, report.check)


def _measure(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    implementation: str,
    shape: ModelShape | None,
    on_part: Callable[[str], object],
) -> Iterator[Measured]:
    """Run a step of a conversation a few times in each way, and note what it took or why it failed."""
    tree, npass_seconds = PrefixTree.from_samples(samples), None
    for schedule in Schedule:
        on_part(f"{schedule}, {len(samples)} turns")
        is_npass = schedule is Schedule.NPASS_PACKED
        seconds = used = failed = bound = None
        with _attention_for(schedule, model, implementation) as attention:
            try:
                step = make_step(model, samples, schedule)
                times, used = measure(model, step, repeats=3 if model.device.type == "cuda" else 1)
                seconds = min(times)
            except Exception as error:  # as above
                failed = _line(error)
        _collect()
        if is_npass:
            npass_seconds = seconds
        if shape is not None:
            bound = 1.0 if is_npass else npass_cost(samples, shape).flops / single_pass_cost([tree], shape).flops
        yield Measured(
            turns=len(samples),
            schedule=schedule.value,
            attn_implementation=attention,
            tokens=sum(map(len, samples)) if is_npass else len(tree),
            seconds=seconds,
            peak_bytes=used,
            speedup=npass_seconds / seconds if npass_seconds and seconds else None,
            bound=bound,
            failed=failed,
        )


@contextmanager
def _attention_for(schedule: Schedule, model: PreTrainedModel, implementation: str) -> Iterator[str]:
    """Waves hand keys and values from row to row, which FlexAttention cannot do."""
    name = tree_attention_name(implementation)
    if schedule is not Schedule.WAVES or name != TREE_ATTENTION["flex_attention"]:
        yield implementation
        return
    set_text_attention(model, tree_attention_name("sdpa"))
    try:
        yield "sdpa"
    finally:
        set_text_attention(model, name)


# The first layers of a model -----------------------------------------------------------------------------------------


def slice_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return the configuration of a model's first layers. Of a multimodal model, the text part is taken."""
    text = copy.deepcopy(config.get_text_config())
    total = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == total:  # one entry per layer: layer_types and the like
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    return text


def layers_that_fit(config: PreTrainedConfig, num_tokens: int, device: torch.device) -> int:
    """Return how many of a model's first layers can be verified in float32, and timed on a row of `num_tokens`."""
    text = config.get_text_config()
    total = int(text.num_hidden_layers)
    types = list(getattr(text, "layer_types", None) or ())
    smallest = max((types.index(kind) + 1 for kind in set(types)), default=1)  # layers with one of each type
    most = total if device.type == "cuda" else min(total, max(smallest, MOST_LAYERS_ON_CPU))
    free = SHARE_OF_FREE_MEMORY * free_bytes(device)
    for num_layers in range(most, smallest - 1, -1):
        if _bytes_of_slice(slice_config(text, num_layers), num_tokens) <= free:
            return num_layers
    raise ValueError(
        f"Not even the first {smallest} of {total} layers fit: they need "
        f"{_bytes_of_slice(slice_config(text, smallest), num_tokens) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
        "free. Close other programs, or name a smaller model."
    )


def _bytes_of_slice(text: PreTrainedConfig, num_tokens: int) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    activations = ActivationBytes.from_config(text, 4, checkpointing=True).per_token
    return int(BYTES_PER_PARAMETER * parameters + activations * num_tokens)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# What was found: records that become JSON as they are, and a table ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Examined:
    """The model that was looked at."""

    name: str  # folder or hub id; "built-in" without one
    architecture: str  # class of the model
    num_layers: int  # layers that ran, the first of the model
    total_layers: int
    device: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """The attention kernel that the model runs on."""

    attn_implementation: str  # the model's choice
    tree_attention: str  # registered name of its tree attention
    reason: str
    faster: str | None  # how attention gets faster on this machine, and by how much


@dataclass(frozen=True, slots=True)
class Verified:
    """N-pass and the single pass compared in one precision."""

    dtype: str  # of the weights
    attn_implementation: str
    ok: bool
    found: str  # the verdict, or the error if it did not run
    check: TreeCheckReport | None  # the measured check; `None` if it did not run


@dataclass(frozen=True, slots=True)
class Measured:
    """One training step, forward and backward with gradient checkpointing."""

    turns: int  # of the conversation
    schedule: str  # a name of [`Schedule`]
    attn_implementation: str
    tokens: int  # of the row
    seconds: float | None  # the best of a few
    peak_bytes: int | None  # above what was in use before the step
    speedup: float | None  # seconds of packed N-pass ÷ these
    bound: float | None  # counted operations of N-pass ÷ those of this schedule, if the model's can be counted
    failed: str | None  # error, if it did not run

    @property
    def cells(self) -> list[str]:
        """A row of the report's table."""
        mebibytes = None if self.peak_bytes is None else self.peak_bytes / 2**20
        numbers = ((self.seconds, ".3f"), (mebibytes, ",.0f"), (self.speedup, ".2f"), (self.bound, ".2f"))
        return [
            str(self.turns),
            NAMES[self.schedule] + (": failed" if self.failed else ""),
            self.attn_implementation,
            f"{self.tokens:,}",
            *("" if value is None else f"{value:{form}}" for value, form in numbers),
        ]


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What the doctor found."""

    environment: Environment
    model: Examined
    kernel: Kernel
    verified: tuple[Verified, ...]  # by precision
    measured: tuple[Measured, ...]  # by conversation and schedule

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong: known problems, disagreement with N-pass, and steps that did not run."""
        differing = (
            f"verify in {one.dtype} on {one.attn_implementation}: {one.found}" for one in self.verified if not one.ok
        )
        failed = (f"{one.schedule}, {one.turns} turns: {one.failed}" for one in self.measured if one.failed)
        return (*self.environment.problems, *differing, *failed)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.complaints

    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON can hold it."""
        return {**asdict(self), "complaints": list(self.complaints), "ok": self.ok}

    def __rich__(self) -> Group:
        table = Table(title="Forward and backward, checked and measured", box=box.SIMPLE_HEAD, title_justify="left")
        for name in ("turns", "schedule", "attention", "tokens", "seconds", "peak MiB", "speed-up", "bound"):
            table.add_column(name, justify="left" if name in ("schedule", "attention") else "right", no_wrap=True)
        for check in self.verified:
            outcome = "agrees" if check.ok else "failed" if check.check is None else "DIFFERS"
            cells = ("", f"verify, {check.dtype}: {outcome}", check.attn_implementation)
            table.add_row(*cells, end_section=check is self.verified[-1])
        for one in self.measured:
            table.add_row(*one.cells)
        complaints = [Text(f"- {complaint}") for complaint in self.complaints]
        verdict = Text("Nothing is wrong." if self.ok else f"{len(complaints)} to look at:", style="bold")
        return Group(_facts(self), table, verdict, *complaints)


def _facts(report: DoctorReport) -> Table:
    found, model, kernel = report.environment, report.model, report.kernel
    gpus = ", ".join(f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in found.gpus) or "no GPU"
    installed = ", ".join(f"{name} {number}" for name, number in found.packages.items() if number)
    missing = ", ".join(name for name, number in found.packages.items() if not number)
    part = "all" if model.num_layers == model.total_layers else f"the first {model.num_layers} of"
    rows = {
        "machine": f"{found.system}, {gpus}, driver {found.driver or 'none'}, CUDA {found.cuda or 'none'}",
        "installed": f"Python {found.python}, {installed}",
        "missing": missing or "nothing",
        "model": f"{model.name}: {model.architecture}, {part} {model.total_layers} layers, on {model.device}",
        "kernel": f"{kernel.attn_implementation} as {kernel.tree_attention}: {kernel.reason}",
        **({"faster": kernel.faster} if kernel.faster else {}),
    }
    facts = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        facts.add_row(Text(name, style="bold"), Text(text))
    return facts
