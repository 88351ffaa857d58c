"""The measured check of a trainer: once per run, before its first step, with the model as the engine wrapped it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from ..attention.row_group import RowGroup
from ..data.collator import Batch, DataCollatorForSinglePass
from ..data.preparation import say
from ..engine.check.checked_model import TreeCheckError
from ..engine.check.row import ShownImage
from ..engine.check.tree_check import TreeCheck, TreeCheckReport, tokens_of_batch


_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SelfCheck:
    """
    Measures models before they are trained, each once. Every rank takes part; `is_on` is the setting `self_check`.
    """

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
        Measure a model on tokens of its first batches, unless that has been done.

        Takes the model as the engine wrapped it; an image comes from the first batch that has one. A model that
        computes something else on a tree than on separate samples raises `TreeCheckError`.
        """
        if model in self._done or not batches:
            return
        self._done.add(model)
        if not self._is_on:
            self._say("self_check=False: nothing shows that the model is exact on trees.", logging.WARNING)
            return
        text, images = self._on_all_ranks(*tokens_of_batch(next((b for b in batches if b["tree"].images), batches[0])))
        precision = _PRECISIONS.get(self._accelerator.mixed_precision)
        check = TreeCheck(model, collator, group, precision)
        report = check.run(text, images)
        if not report.ok:
            raise TreeCheckError(_explain(check, report))
        self._say(f"Checked: {report}.", logging.INFO)

    def _on_all_ranks(self, text: Any, images: tuple[ShownImage, ...]) -> tuple[Any, tuple[ShownImage, ...]]:
        """Return the same text on all ranks, and images if each rank has one: each finds only its own."""
        if self._accelerator.num_processes == 1:
            return text, images
        texts = [text]
        broadcast_object_list(texts)
        has_images = torch.tensor([len(images) > 0], device=self._accelerator.device)
        return texts[0], images if bool(self._accelerator.gather(has_images).all()) else ()

    def _say(self, line: str, level: int) -> None:
        if self._accelerator.is_main_process:
            say(line, level)


def _explain(check: TreeCheck, report: TreeCheckReport) -> str:
    where = f" {report.where}." if report.where else ""
    where += f" Without its adapters ({report.adapters}), it does." if report.adapters else ""
    return (
        f"{type(check.model.base).__name__} does not compute on a tree what it computes on separate samples: "
        f"{report.reason}.{where} Nothing was trained. Train it on one sample per turn (N-pass: `to_npass` and TRL's "
        "own trainer), or take out the layer or adapter that mixes the tokens of a row; check_tree(model, tokenizer) "
        "measures it again."
    )
