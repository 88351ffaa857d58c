"""A stock and a single-pass trainer whose steps train the same conversations."""

import copy

import pytest
from torch.utils.data import DataLoader, SequentialSampler
from trl import SFTConfig, SFTTrainer

from support.conversations import chat, expand
from support.trainers import SETTINGS, as_dataset
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer


# One to three turns each, so that batches of as many conversations hold different numbers of samples.
CONVERSATIONS = [chat(3 - seed % 3, seed) for seed in range(8)]


class InOrder(SinglePassSFTTrainer):
    """A single-pass trainer that keeps the order of the dataset."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class Expanded(SFTTrainer):
    """A stock trainer whose batches hold all samples of the conversations in a batch of the single pass."""

    def __init__(self, *args, turns_per_batch, **kwargs):
        self.turns_per_batch = turns_per_batch
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self):
        batches, start = [], 0
        for turns in self.turns_per_batch:
            batches.append(list(range(start, start + turns)))
            start += turns
        dataset = self._remove_unused_columns(self.train_dataset, description="training")
        return self.accelerator.prepare(DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator))


def stock_trainer(tmp_path, tokenizer, model, conversations=CONVERSATIONS, evaluation=None, kwargs=None, **settings):
    """Return stock `SFTTrainer` for the expanded samples, evaluating all of them in one batch."""
    size = settings["per_device_train_batch_size"]
    turns = [len(expand(messages)) for messages in conversations]
    return Expanded(
        copy.deepcopy(model),
        SFTConfig(**_settings(tmp_path, **settings, per_device_eval_batch_size=1000)),
        train_dataset=as_dataset([row for messages in conversations for row in expand(messages)]),
        eval_dataset=evaluation and as_dataset([row for messages in evaluation for row in expand(messages)]),
        processing_class=tokenizer,
        turns_per_batch=[sum(turns[start : start + size]) for start in range(0, len(turns), size)],
        **(kwargs or {}),
    )


def single_pass_trainer(
    tmp_path, tokenizer, model, conversations=CONVERSATIONS, evaluation=None, kwargs=None, **settings
):
    """Return the single-pass trainer for the same conversations in the same order."""
    return InOrder(
        copy.deepcopy(model),
        SinglePassSFTConfig(**_settings(tmp_path, **settings)),
        train_dataset=as_dataset(conversations),
        eval_dataset=evaluation and as_dataset(evaluation),
        processing_class=tokenizer,
        **(kwargs or {}),
    )


def train_both(*args, **settings):
    """Train copies of a model both ways on the same conversations per step; return both trainers."""
    settings = {"per_device_train_batch_size": 8, **settings}
    trainers = stock_trainer(*args, **settings), single_pass_trainer(*args, **settings)
    for trainer in trainers:
        trainer.train()
    return trainers


def _settings(tmp_path, **settings):
    return {"output_dir": str(tmp_path), "max_length": None, **SETTINGS, **settings}


def adapted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)
