"""The measured check of a trainer: once per run, before its first step, with the model as the engine wrapped it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from ..attention.row_group import RowGroup
from ..data.collator import Batch, DataCollatorForSinglePass
from ..data.preparation import say
from ..engine.check.checked_model import TreeCheckError
from ..engine.check.tree_check import TreeCheck, tokens_of_batch


_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SelfCheck:
    """Measures models before they are trained, each once, if `self_check` is set. Every rank takes part."""

    def __init__(self, accelerator: Accelerator, *, is_on: bool) -> None:
        self._accelerator, self._is_on = accelerator, is_on
        self._done: set[nn.Module] = set()

    def check(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        collator: DataCollatorForSinglePass,
        group: RowGroup | None = None,
    ) -> None:
        """
        Measure a model, as the engine wrapped it, on tokens of its first batches, unless that has been done.

        One that computes something else on a tree than on separate samples raises `TreeCheckError`.
        """
        if model in self._done or not batches:
            return
        self._done.add(model)
        if not self._is_on:
            self._say("self_check=False: nothing shows that the model is exact on trees.", logging.WARNING)
            return
        text, images = tokens_of_batch(next((batch for batch in batches if batch["tree"].images), batches[0]))
        if self._accelerator.num_processes > 1:  # the same text on all, and images if each rank has one
            (text,) = broadcast_object_list([text])
            has_images = torch.tensor([len(images) > 0], device=self._accelerator.device)
            images = images if bool(self._accelerator.gather(has_images).all()) else ()
        check = TreeCheck(model, collator, group, _PRECISIONS.get(self._accelerator.mixed_precision))
        report = check.run(text, images)
        if not report.ok:
            where = f" {report.where}." if report.where else ""
            where += f" Without its adapters ({report.adapters}), it does." if report.adapters else ""
            raise TreeCheckError(
                f"{type(check.model.base).__name__} does not compute on a tree what it computes on separate samples: "
                f"{report.reason}.{where} Nothing was trained. Train it on one sample per turn (N-pass: `to_npass` "
                "and TRL's own trainer), or take out the layer or adapter that mixes the tokens of a row; "
                "check_tree(model, tokenizer) measures it again."
            )
        self._say(f"Checked: {report}.", logging.INFO)

    def _say(self, line: str, level: int) -> None:
        if self._accelerator.is_main_process:
            say(line, level)
