"""Run a slice of a model in every way that is compared, and note what happens."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from ...attention.registry import TREE_ATTENTION, describe_tree_attention, set_text_attention, tree_attention_name
from ...cost.flops import ModelShape, get_model_shape, npass_cost, single_pass_cost
from ...engine.enable import enable_tree
from ...trees.prefix_tree import PrefixTree
from ...trees.sample import Sample
from ..launches import LaunchCounter
from ..npass import stopwatch
from ..peak_memory import peak, reset_peak
from ..random_conversations import Sizes, conversation
from ..report import VerifyReport
from ..steps import Schedule, make_step
from ..verification import verify, verify_samples
from .chats import CHATS
from .environment import Environment, faster_kernel
from .report import DoctorReport, Examined, Kernel, Measured, Verified
from .slices import layers_that_fit, slice_config


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TURNS = (2, 8, 16)
# A CPU would take minutes for the lengths of real turns.
SIZES_ON_CPU = Sizes(user=(4, 8), reasoning=(20, 60), answer=(6, 12), system=5)
FULL_PRECISION = ("sdpa", "eager", "flex_attention")
"""Attention that computes in float32; flash kernels are for half precision only."""
SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 65536}
BUILT_IN_ON_GPU = {**SHAPE, "vocab_size": 32000, "hidden_size": 1024, "head_dim": 128, "intermediate_size": 3072}
BUILT_IN_ON_CPU = {**SHAPE, "vocab_size": 1000, "hidden_size": 128, "head_dim": 16, "intermediate_size": 384}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to look at."""

    name: str  # folder or hub id
    config: PreTrainedConfig  # of the whole model
    # with a chat template; without one, `verify` gets random tokens instead of chats
    tokenizer: PreTrainedTokenizerBase | None
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

        return cls("built-in", config, None, load)


def examine(
    subject: Subject,
    device: torch.device,
    *,
    attn_implementation: str | None = None,
    turns: Sequence[int] = DEFAULT_TURNS,
    on_part: Callable[[str], object] = lambda what: None,
) -> DoctorReport:
    """
    Look at this machine with a model: what is installed, whether training is right, and how fast it is.

    An error in one part is noted in the report, and the next part runs. As many layers of the model run as fit; if not
    even its smallest slice does, this raises `ValueError`. `turns` are the lengths of the conversations that are
    timed, and `on_part` is called with a description before each part.
    """
    sizes = Sizes() if device.type == "cuda" else SIZES_ON_CPU
    vocabulary = min(int(subject.config.get_text_config().vocab_size), 30_000)
    conversations = [conversation(length, vocabulary, length, sizes) for length in turns]
    longest = max(sum(map(len, samples)) for samples in conversations)
    num_layers = layers_that_fit(subject.config, longest, device)
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
    timing = _Timing(model, get_shape(config))
    for samples in conversations:
        for schedule in Schedule:
            on_part(f"{schedule}, {len(samples)} turns")
            timing.measure(samples, schedule)
    text_config = subject.config.get_text_config()
    examined = Examined(subject.name, type(model).__name__, num_layers, text_config.num_hidden_layers, str(device))
    environment = Environment.detect()
    has_choice = not getattr(model, "_compatible_flash_implementations", None)  # transformers replaces any other
    kernel = Kernel(
        implementation,
        tree_attention_name(implementation),
        describe_tree_attention(implementation, config, device, dtype),
        timing.attention_operators,
        faster_kernel(implementation, environment.gpus, environment.packages) if has_choice else None,
    )
    return DoctorReport(environment, examined, kernel, tuple(verified), tuple(timing.measured))


def get_shape(config: PreTrainedConfig) -> ModelShape | None:
    """Return the sizes that operations are counted with; `None` for a model whose operations cannot be counted."""
    try:
        return get_model_shape(config)
    except ValueError:
        return None


def _verify(
    subject: Subject, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, vocabulary: int
) -> Verified:
    if dtype is torch.float32 and attention is not None and attention not in FULL_PRECISION:
        attention = "sdpa"
    name = attention or "default"
    try:
        model = subject.load(config, dtype, attention)
        name = str(model.config.get_text_config()._attn_implementation)
        report = _verify_chats(model, subject.tokenizer, vocabulary)
    except Exception as error:  # whatever a kernel raises is what the reader wants to know
        return Verified(_name(dtype), name, False, 0, None, None, None, None, None, _line(error))
    turns = [turn for row in report.rows for turn in row.turns]
    worst_turn = max(turns, key=lambda turn: turn.error - turn.allowed)
    worst_row = max(report.rows, key=lambda row: row.gradient_error - row.gradient_allowed)
    return Verified(
        dtype=_name(dtype),
        attn_implementation=name,
        ok=report.ok,
        turns=len(turns),
        loss_error=worst_turn.error,
        loss_allowed=worst_turn.allowed,
        gradient_error=worst_row.gradient_error,
        gradient_allowed=worst_row.gradient_allowed,
        leaked=max(row.leak.leaked for row in report.rows),
        failed=None,
    )


def _verify_chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> VerifyReport:
    if tokenizer is not None:
        return verify(model, tokenizer, CHATS)
    return verify_samples(model, [conversation(turns, vocabulary, turns, SIZES_ON_CPU) for turns in (1, 2, 4)])


class _Timing:
    """
    Steps of a model on its kernel, one after the other. Takes a model in training mode, and the sizes that operations
    are counted with.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape | None) -> None:
        self.measured: list[Measured] = []
        self.attention_operators: tuple[str, ...] | None = None
        self._model, self._shape = model, shape
        self._implementation = enable_tree(model)
        self._repeats = 3 if model.device.type == "cuda" else 1
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def measure(self, samples: Sequence[Sample], schedule: Schedule) -> None:
        """Run a step a few times, and note what it took or why it failed."""
        tree = PrefixTree.from_samples(samples)
        tokens = sum(map(len, samples)) if schedule is Schedule.NPASS_PACKED else len(tree)
        found: tuple[int | None, float, int] | None = None
        failed = None
        with self._attention_for(schedule) as attention:
            try:
                found = self._run(samples, schedule)
            except Exception as error:  # as above
                failed = _line(error)
        self._model.zero_grad()
        _collect()
        launches, seconds, used = found or (None, None, None)
        npass = next((one.seconds for one in self.measured if one.turns == len(samples)), seconds)
        self.measured.append(
            Measured(
                turns=len(samples),
                schedule=schedule.value,
                attn_implementation=attention,
                tokens=tokens,
                launches=launches,
                seconds=seconds,
                peak_bytes=used,
                speedup=npass / seconds if npass and seconds else None,
                bound=self._bound(samples, tree, schedule),
                failed=failed,
            )
        )

    def _run(self, samples: Sequence[Sample], schedule: Schedule) -> tuple[int | None, float, int]:
        step = make_step(self._model, samples, schedule)
        if self._model.device.type == "cuda":
            step()  # compiles kernels, which the counter would disturb
        counter = _count(step)
        if schedule is Schedule.SINGLE_PASS:
            self.attention_operators = None if counter is None else counter.attention_operators
        before, times = reset_peak(), []
        for _ in range(self._repeats):
            with stopwatch(self._model) as seconds:
                step()
            times.append(seconds())
        return None if counter is None else counter.total, min(times), peak() - before

    @contextmanager
    def _attention_for(self, schedule: Schedule) -> Iterator[str]:
        """Waves hand keys and values from row to row, which FlexAttention cannot do."""
        name = tree_attention_name(self._implementation)
        if schedule is not Schedule.WAVES or name != TREE_ATTENTION["flex_attention"]:
            yield self._implementation
            return
        set_text_attention(self._model, tree_attention_name("sdpa"))
        try:
            yield "sdpa"
        finally:
            set_text_attention(self._model, name)

    def _bound(self, samples: Sequence[Sample], tree: PrefixTree, schedule: Schedule) -> float | None:
        if self._shape is None:
            return None
        if schedule is Schedule.NPASS_PACKED:
            return 1.0
        return npass_cost(samples, self._shape).flops / single_pass_cost([tree], self._shape).flops


def _count(step: Callable[[], object]) -> LaunchCounter | None:
    """Operators of a step; `None` where FlexAttention is compiled: no dispatch mode looks into it."""
    counter = LaunchCounter()
    try:
        with counter:
            step()
    except NotImplementedError:
        return None
    return counter


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
