"""Trainers on tiny models, stock and single-pass, and what tests read off them."""

import inspect
from importlib.util import find_spec

import datasets
import pytest
import torch
import transformers
import trl
from packaging.version import Version
from trl import SFTConfig, SFTTrainer

from support.tiny_models import tiny_model
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer
from trl_singlepass.data.arrow import COST_COLUMNS
from trl_singlepass.training.config import EngineConfig, SinglePassConfig
from trl_singlepass.trees.rows import ROW_COLUMNS


needs_weighted_loss = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="loss weights reach the loss through the fused head of TRL 1.15"
)
NEEDS_BITSANDBYTES = [
    pytest.mark.slow,  # `make test-slow` installs it
    pytest.mark.skipif(
        find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install trl-singlepass[quantization]"
    ),
]
needs_cached_states = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="recurrent layers keep their states in the cache since 5.23",
)

SETTINGS = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "max_steps": 1,
}


def as_dataset(rows):
    """Return rows as a dataset; lists of messages become rows with a `messages` column."""
    return datasets.Dataset.from_list([{"messages": row} if isinstance(row, list) else row for row in rows])


def columns_of_rows(dataset):
    """Return the rows of a prepared dataset without the columns that it keeps of what was given."""
    return dataset.select_columns([*ROW_COLUMNS, *COST_COLUMNS])[:]


def float32_model(tokenizer, family="qwen3", **overrides):
    """Return a tiny model whose vocabulary and special tokens are the tokenizer's."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    overrides = {"initializer_range": 0.05, **ids, **overrides}
    return tiny_model(family, len(tokenizer), torch.float32, attn_implementation="sdpa", **overrides)


def own_settings(config):
    """Names of the settings that a configuration adds to TRL's, or whose defaults it changes: shared ones first."""
    shared = [cls for cls in (EngineConfig, SinglePassConfig) if issubclass(config, cls)]
    return list(dict.fromkeys(name for cls in (*shared, config) for name in cls.__annotations__))


def own_classes(trainer):
    """Return the classes of a trainer that this project defines: its own, then what trainers share."""
    return [cls for cls in trainer.__mro__ if cls.__module__.startswith("trl_singlepass.")]


def own_methods(trainer):
    return {name for cls in own_classes(trainer) for name, member in vars(cls).items() if inspect.isfunction(member)}


def overridden(trainer):
    """Names of the methods of other libraries that a trainer overrides, itself or by what trainers share."""
    theirs = [cls for cls in trainer.__mro__ if cls not in own_classes(trainer)]
    return own_methods(trainer) & {name for cls in theirs for name in vars(cls)}


def single_pass_trainer(tmp_path, tokenizer, dataset, model=None, config=SinglePassSFTConfig, kwargs=None, **settings):
    """Return a single-pass trainer on a dataset or on rows."""
    return _trainer(SinglePassSFTTrainer, config, tmp_path, tokenizer, dataset, model, kwargs, settings)


def stock_trainer(tmp_path, tokenizer, dataset, model=None, kwargs=None, **settings):
    """Return TRL's trainer on a dataset or on rows."""
    settings = {"max_length": None, **settings}
    return _trainer(SFTTrainer, SFTConfig, tmp_path, tokenizer, dataset, model, kwargs, settings)


def _trainer(trainer_class, config_class, tmp_path, tokenizer, dataset, model, kwargs, settings):
    return trainer_class(
        model=model or float32_model(tokenizer),
        args=config_class(str(tmp_path), **{**SETTINGS, **settings}),
        train_dataset=as_dataset(dataset) if isinstance(dataset, list) else dataset,
        processing_class=tokenizer,
        **(kwargs or {}),
    )


def parameters(trainer):
    """Return a copy of the model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def largest_difference(trainer, other):
    """Return the largest difference of a parameter between two trainers' models."""
    ours, theirs = parameters(trainer), parameters(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def logs(trainer):
    """Return all that a trainer logged, without what a clock measured."""
    clocks = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(clocks)}
        for entry in trainer.state.log_history
    ]


def logged(trainer, key):
    """Return the values that a trainer logged under a key, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
