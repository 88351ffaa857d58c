"""The measured check of a trainer: before its first step, and when what was measured has changed since."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from ..attention.row_group import RowGroup
from ..data.collator import Batch, DataCollatorForSinglePass
from ..data.preparation import say
from ..engine.check.checked_model import TreeCheckError, unwrapped
from ..engine.check.own_rows import samples_of
from ..engine.check.tree_check import TreeCheck, refusal, tokens_of_batch
from ..engine.enable import without_adapters
from ..engine.model_call import take_trees


_OF_CONFIG = ("_attn_implementation", "_experts_implementation", "rope_parameters")
_PLAIN = {bool, int, float, str}
_MODES = {"training", "gradient_checkpointing", "_ran_on_tree"}  # which change between steps
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What a check may take, own rows included: the first one, and all later ones together.
_SECONDS, _SHARE_OF_RUN = 4.0, 0.02


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """
    What a model computes with: `structure` changes with its code, `values` with what its modules count or switch.

    Of each module, structure holds its class, the forward of the class and of its own, its hooks, its adapters, and
    which of its parameters are trained, in which dtype; of the model, its configuration of attention and RoPE.
    """

    structure: tuple[Any, ...] = ()
    values: tuple[Hashable, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """Read a model, about 3 µs per module."""
        structure: list[Any] = []
        values: list[Hashable] = []
        read: set[int] = set()  # configurations, which layers share
        stack: list[Any] = [unwrapped(model)]
        while stack:
            module = stack.pop()
            own, kind = module.__dict__, module.__class__
            structure += (
                kind,
                kind.forward,
                own.get("forward"),
                len(own["_forward_pre_hooks"]),
                len(own["_forward_hooks"]),
                len(own["_backward_pre_hooks"]),
                len(own["_backward_hooks"]),
            )
            for x in own["_parameters"].values():
                if x is not None:
                    structure += (x.requires_grad, x.dtype)
            values += [x for name, x in own.items() if x.__class__ in _PLAIN and name not in _MODES]
            if "_active_adapter" in own:
                structure.append(str((own["_active_adapter"], own.get("merged_adapters"))))
            config = own.get("config")
            if config is not None and id(config) not in read:
                read.add(id(config))
                text = config.get_text_config() if hasattr(config, "get_text_config") else config
                found = [getattr(text, name, None) for name in _OF_CONFIG]
                structure.append(str(found))
            stack += [child for child in own["_modules"].values() if child is not None]
        structure.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return cls(tuple(structure), tuple(values))

    def difference(self, other: Fingerprint) -> str:
        """Return the first part in which the structure of another differs."""
        pairs = zip(self.structure, other.structure, strict=False)
        return next(
            (f"{a} → {b}" for a, b in pairs if a != b), f"{len(other.structure) - len(self.structure):+d} parts"
        )


@dataclass(frozen=True)
class _Measured:
    """What was measured of a model: its state, and the number of tokens of the longest row."""

    fingerprint: Fingerprint
    num_tokens: int
    since: float  # when
    spent: float = 0.0  # seconds of later checks


class SelfCheck:
    """Measures models before they are trained, and again when they change, if `self_check` is set, on every rank."""

    def __init__(self, accelerator: Accelerator, *, is_on: bool) -> None:
        self._accelerator, self._is_on = accelerator, is_on
        self._measured: dict[nn.Module, _Measured] = {}

    def has_measured(self, model: nn.Module) -> bool:
        """Return whether a model was measured before, as it is now or not."""
        return model in self._measured

    def check(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        collator: DataCollatorForSinglePass,
        group: RowGroup | None = None,
        longest: Callable[[], Sequence[Batch]] = tuple,
    ) -> None:
        """
        Measure a model, as the engine wrapped it, unless that has been done and neither it nor its rows have changed.

        Its rows are those of its first batches, and the `longest` of the run if these are known. A model that computes
        something else on a tree than on separate samples raises `TreeCheckError`.
        """
        if not batches:
            return
        take_trees(without_adapters(unwrapped(model)))  # another trainer may have put its head around it
        before = self._measured.get(model)
        if not self._is_on:
            if before is None:
                self._say("self_check=False: nothing shows that the model is exact on trees.", logging.WARNING)
                self._measured[model] = _Measured(Fingerprint(), 0, 0)
            return
        now, num_tokens = Fingerprint.of(model), max(batch["input_ids"].shape[1] for batch in batches)
        if before is not None and not self._has_changed(before, now, num_tokens):
            return
        start = time.monotonic()
        self._measure(model, [*(longest() if before is None else ()), *batches], collator, group)
        end = time.monotonic()
        num_tokens = max(num_tokens, 0 if before is None else before.num_tokens)
        now = Fingerprint.of(model)
        self._measured[model] = (
            _Measured(now, num_tokens, end)
            if before is None
            else replace(before, fingerprint=now, num_tokens=num_tokens, spent=before.spent + end - start)
        )

    def _has_changed(self, before: _Measured, now: Fingerprint, num_tokens: int) -> bool:
        """Return whether to measure again: whatever it costs if the model is another, within limits if it counts."""
        if before.fingerprint.structure != now.structure:
            self._say(
                f"The model has changed since it was measured ({before.fingerprint.difference(now)}).", logging.INFO
            )
            return True
        # Ranks may not decide by their own clocks or rows.
        has_time = before.spent < max(_SECONDS, _SHARE_OF_RUN * (time.monotonic() - before.since))
        is_other = before.fingerprint.values != now.values or num_tokens > before.num_tokens
        return is_other and has_time and self._accelerator.num_processes == 1

    def _measure(
        self, model: nn.Module, batches: Sequence[Batch], collator: DataCollatorForSinglePass, group: RowGroup | None
    ) -> None:
        text, images = tokens_of_batch(next((batch for batch in batches if batch["tree"].images), batches[0]))
        found = [[sample for sample, _ in samples_of(batch)] for batch in batches if group is None]
        samples = max(found, key=lambda samples: sum(map(len, samples)), default=[])
        if self._accelerator.num_processes > 1:  # the same text on all, and images if each rank has one
            text, samples = broadcast_object_list([text, samples])
            has_images = torch.tensor([len(images) > 0], device=self._accelerator.device)
            images = images if bool(self._accelerator.gather(has_images).all()) else ()
        check = TreeCheck(model, collator, group, _PRECISIONS.get(self._accelerator.mixed_precision))
        report = check.run(text, images)
        if not report.ok:
            raise TreeCheckError(refusal(check.model.base, report))
        own = check.run_own(samples, _SECONDS - report.seconds)
        if own is not None and own.what is not None:
            raise TreeCheckError(refusal(check.model.base, own))
        self._say(f"Checked: {report}{'' if own is None else f'; {own}'}.", logging.INFO)

    def _say(self, line: str, level: int) -> None:
        if self._accelerator.is_main_process:
            say(line, level)
