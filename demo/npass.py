"""N-pass as a baseline: TRL's own trainer on one sample per turn, stepping over the same conversations."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import SFTTrainer

from trl_singlepass import Sample


# Samples of similar length share a forward up to this many tokens. On a CPU nothing is faster than one sample at a
# time without any padding; a GPU wants more work at once.
MAX_TOKENS_PER_FORWARD = 8192 if torch.cuda.is_available() else 1


def as_stock_dataset(samples: list[Sample]) -> Dataset:
    """Samples as TRL takes them: token ids and where the completion lies."""
    return Dataset.from_list(
        [
            {"input_ids": sample.token_ids.tolist(), "completion_mask": (sample.loss_weights > 0).astype(int).tolist()}
            for sample in samples
        ]
    )


class NPassTrainer(SFTTrainer):
    """
    TRL's trainer with the batches of single pass: one step takes all samples of the step's conversations.

    Model, loss, optimizer and schedule are TRL's. Only what a step consists of differs from stock, because stock
    counts a batch in samples, and conversations differ in how many they have.
    """

    def __init__(self, *args: Any, samples_per_step: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.samples_per_step = samples_per_step

    def get_train_dataloader(self) -> DataLoader:
        indices = iter(range(len(self.train_dataset)))
        batches = [[next(indices) for _ in range(count)] for count in self.samples_per_step]
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        # Every part's loss is its sum over `num_items_in_batch`, the targets of the whole step.
        parts = _parts_of_similar_length(inputs)
        losses = [super(NPassTrainer, self).training_step(model, part, num_items_in_batch) for part in parts]
        return torch.stack(losses).sum()


def _parts_of_similar_length(inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    lengths = inputs["attention_mask"].sum(1)
    order = lengths.argsort(descending=True).tolist()
    while order:
        longest = int(lengths[order[0]])
        count = max(1, MAX_TOKENS_PER_FORWARD // longest)
        part, order = order[:count], order[count:]
        yield {name: tensor[part, :longest] for name, tensor in inputs.items()}
