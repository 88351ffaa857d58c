"""N-pass as a baseline: TRL's trainer on one sample per turn, with the same conversations per step."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import SFTTrainer

from trl_singlepass import Sample


# Samples of similar length share a forward pass of up to this many tokens. On a CPU, one sample at a time without
# padding is fastest; a GPU needs more work at once.
MAX_TOKENS_PER_FORWARD = 8192 if torch.cuda.is_available() else 1


def as_stock_dataset(samples: list[Sample]) -> Dataset:
    """Return samples in TRL's format: token ids and a mask for the completion."""
    return Dataset.from_list(
        [
            {"input_ids": sample.token_ids.tolist(), "completion_mask": (sample.loss_weights > 0).astype(int).tolist()}
            for sample in samples
        ]
    )


class NPassTrainer(SFTTrainer):
    """
    TRL's trainer with the batches of the single pass: a step takes all samples of its conversations.

    Model, loss, optimizer and schedule are TRL's. Only the contents of a step differ: stock counts a batch in samples,
    and conversations have different numbers of samples.
    """

    def __init__(self, *args: Any, samples_per_step: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.samples_per_step = samples_per_step

    def get_train_dataloader(self) -> DataLoader:
        indices = iter(range(len(self.train_dataset)))
        batches = [[next(indices) for _ in range(count)] for count in self.samples_per_step]
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        # The loss of each part is its sum divided by `num_items_in_batch`, the number of targets in the whole step.
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
