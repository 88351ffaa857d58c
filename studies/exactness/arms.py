"""The arms of the study: ways of training a conversation, each with its prepared dataset and its trainer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer, to_npass
from trl_singlepass.cost import ModelShape, single_pass_cost
from trl_singlepass.trees.rows import Row, TreePlan


class PlannedSteps:
    """A trainer with a given plan of steps, so that all arms train the same conversations in the same order."""

    steps: Sequence[Sequence[int]]
    losses: list[float]

    def get_train_dataloader(self) -> DataLoader:
        self.losses = []
        return DataLoader(self.train_dataset, batch_sampler=self.steps, collate_fn=self.data_collator)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))  # the losses that the Trainer logs are rounded to float32
        return loss


class SinglePassInSteps(PlannedSteps, SinglePassSFTTrainer):
    """The single-pass trainer, on whole conversations."""


class StockInSteps(PlannedSteps, SFTTrainer):
    """TRL's trainer, with its own model, loss and optimizer."""


@dataclass(frozen=True)
class Arm:
    """One way of training conversations."""

    title: str
    trainer: type
    config: type
    settings: dict[str, Any] = field(default_factory=dict)
    expand: Callable[..., Dataset] | None = None

    def build(self, model: Any, tokenizer: Any, rows: list[dict[str, Any]], arguments: dict[str, Any]) -> Any:
        """Return a trainer with a prepared dataset; its steps are set later."""
        dataset = Dataset.from_list(rows)
        trainer = self.trainer(
            model=model,
            args=self.config(**arguments, **self.settings),
            train_dataset=dataset if self.expand is None else self.expand(dataset, tokenizer),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


ARMS = {
    "single_pass": Arm("single pass, exact", SinglePassInSteps, SinglePassSFTConfig),
    "keep_reasoning": Arm("reasoning kept", SinglePassInSteps, SinglePassSFTConfig, {"history": "keep"}),
    "assistant_only_loss": Arm("TRL assistant_only_loss", StockInSteps, SFTConfig, {"assistant_only_loss": True}),
    "last_turn": Arm("last turn only", SinglePassInSteps, SinglePassSFTConfig, {"train_turns": "last"}),
    "npass": Arm("N-pass", StockInSteps, SFTConfig, expand=to_npass),
}


class Prepared:
    """The rows, trained tokens and counted operations of each conversation in an arm."""

    def __init__(self, trainer: Any, rows_per_conversation: Sequence[int]) -> None:
        shape = ModelShape.from_config(trainer.model.config)
        trained, flops = zip(*(_counted(row, shape) for row in trainer.train_dataset), strict=True)
        ends = list(accumulate(rows_per_conversation))
        self.rows = [range(end - count, end) for end, count in zip(ends, rows_per_conversation, strict=True)]
        self.trained_tokens = [sum(trained[rows.start : rows.stop]) for rows in self.rows]
        self.flops = [sum(flops[rows.start : rows.stop]) for rows in self.rows]

    def rows_of(self, steps: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the rows of the dataset for each step of conversations."""
        return [[row for conversation in step for row in self.rows[conversation]] for step in steps]


def _counted(row: dict[str, Any], shape: ModelShape) -> tuple[int, int]:
    """Return trained tokens and operations, without padding, of a tree or a plain sequence."""
    if "subtree_end" in row:
        tree = Row.from_columns(row)
        plan = TreePlan.from_rows([tree])
        depths, labels = plan.depths(), tree.targets(plan).labels
    else:
        depths, labels = np.arange(len(row["input_ids"])), np.asarray(row["labels"])
    cost = single_pass_cost([SimpleNamespace(position_ids=depths, labels=labels)], shape)
    return cost.targets, cost.flops


def ordered_steps(seed: int, prepared: Prepared, trained_tokens_per_step: int) -> Iterator[list[int]]:
    """
    Steps of conversations without end, every epoch in another order.

    A step takes conversations until it has so many trained tokens, so that a step of an arm that trains less of each
    conversation holds more conversations, and an optimizer step rests on as many tokens in every arm.
    """
    random, step, tokens = np.random.default_rng(seed), list[int](), 0
    while True:
        for conversation in random.permutation(len(prepared.rows)).tolist():
            step.append(conversation)
            tokens += prepared.trained_tokens[conversation]
            if tokens >= trained_tokens_per_step:
                yield step
                step, tokens = [], 0
