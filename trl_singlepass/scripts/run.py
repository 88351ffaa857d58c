"""The training script of all trainers: its arguments, its data, and a run from checkpoint to model card."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers import TrainingArguments
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.rewards import get_soft_overlong_punishment

from ..data.files import LINES, TABLES, JsonLines, naming
from ..training.checkpoints import checkpoint_to_resume
from ..training.compatibility import check_before_loading
from ..training.config import EngineConfig
from ..training.preemption import PreemptionCallback


if TYPE_CHECKING:
    from ..groups.trainer import SinglePassGRPOTrainer, SinglePassRLOOTrainer
    from ..preference.trainer import SinglePassDPOTrainer
    from ..training.trainer import SinglePassSFTTrainer


@dataclass
class RolloutArguments:
    """Arguments of the scripts of GRPO and RLOO beside those of TRL."""

    rollout_func: str | None = field(
        default=None, metadata={"help": "Where to import what makes rollouts from, such as `my_agent.rollouts`."}
    )


TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def make_parser_of(
    config: type[EngineConfig],
    prog: str | None = None,
    parser_class: type[TrlParser] = TrlParser,
    script_arguments: type[ScriptArguments] = ScriptArguments,
    **kwargs: Any,
) -> TrlParser:
    """Return the parser of the arguments of the script whose trainer has this configuration."""
    return parser_class((script_arguments, config, ModelConfig, DatasetMixtureConfig), prog=prog, **kwargs)


def train(
    trainer_class: type[SinglePassSFTTrainer | SinglePassDPOTrainer | SinglePassGRPOTrainer | SinglePassRLOOTrainer],
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Train from the checkpoint that is asked for; write the model and its card, unless a signal stopped the run."""
    others: dict[str, Any] = {}
    if hasattr(script_args, "reward_funcs"):  # of GRPO and RLOO
        others["reward_funcs"] = load_rewards(script_args.reward_model_name_or_path, script_args.reward_funcs)
        if script_args.rollout_func is not None:
            others["rollout_func"] = _load("rollout_func", script_args.rollout_func)
    owner = training_args if hasattr(training_args, "trust_remote_code") else model_args  # moved in TRL 1.12
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": owner.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),  # overrides the command line
    }
    check_before_loading(training_args)
    dataset = load_splits(script_args, dataset_args)
    wants_evaluation = training_args.eval_strategy != "no"
    preemption = PreemptionCallback()
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=get_split(dataset, script_args.dataset_train_split),
        eval_dataset=get_split(dataset, script_args.dataset_test_split) if wants_evaluation else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[preemption],
        **others,
    )
    if script_args.ignore_bias_buffers:  # DDP cannot synchronise boolean buffers
        ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = ignored
    checkpoint = checkpoint_to_resume(training_args.resume_from_checkpoint, training_args.output_dir)
    if checkpoint is not None:
        trainer.accelerator.print(f"Resuming from {checkpoint}.")
    elif training_args.resume_from_checkpoint:
        trainer.accelerator.print(f"{training_args.output_dir} has no checkpoint to resume: training starts anew.")
    trainer.train(resume_from_checkpoint=checkpoint)
    if preemption.was_preempted:
        trainer.accelerator.print("Stopped by a signal. --resume_from_checkpoint auto resumes the run.")
        return
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(
        f"Model saved to {training_args.output_dir}. Next: trl-singlepass chat {training_args.output_dir}"
    )
    name, data = Path(training_args.output_dir).name, script_args.dataset_name
    trainer.create_model_card(model_name=name, dataset_name=None if data is None or Path(data).exists() else data)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data)


# Rewards -------------------------------------------------------------------------------------------------------------


def load_rewards(model: str | None, names: Sequence[str] | None) -> list[str | Callable[..., object]]:
    """Return a reward model, if given, and reward functions by name, as TRL's scripts take them, or `ValueError`."""
    rewards: list[str | Callable[..., object]] = [] if model is None else [model]
    rewards += [_load_reward(name) for name in names or ()]
    if not rewards:
        raise ValueError("No reward: pass --reward_funcs or --reward_model_name_or_path.")
    return rewards


def _load_reward(name: str) -> Callable[..., object]:
    module_name, _, function = name.rpartition(".")
    if name == "get_soft_overlong_punishment":
        punishment: Callable[..., object] = get_soft_overlong_punishment(
            max_completion_len=1280, soft_punish_cache=256
        )
        return punishment
    if not module_name and name not in TRL_REWARDS:
        known = ", ".join((*TRL_REWARDS, "get_soft_overlong_punishment"))
        raise ValueError(f"--reward_funcs {name}: expected one of {known}, or where to import it from.")
    return _load("reward_funcs", name if module_name else f"trl.rewards.{function}")


def _load(setting: str, name: str) -> Callable[..., Any]:
    """Return a function that a setting names by where to import it from; the working directory is searched as well."""
    module_name, _, function = name.rpartition(".")
    if not module_name:
        raise ValueError(f"--{setting} {name}: expected where to import it from, such as my_module.{name}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found: Callable[..., Any] | None = getattr(import_module(module_name), function, None)
    if found is None:
        raise ValueError(f"--{setting} {name}: the module {module_name} has no {function}.")
    return found


# Data ----------------------------------------------------------------------------------------------------------------


def load_splits(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """
    Return the splits of a file (only one for training), a folder, a dataset on the Hub, or a mixture, by name.

    No data, no such file, or a setting that belongs to the other of the two kinds of data raises `ValueError`.
    """
    _check_belongs(script_args, dataset_args)
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if not script_args.dataset_name:
        raise ValueError(
            "No data: pass a file, a folder or a hub id as --dataset_name, or list `datasets` in the --config file."
        )
    path, streaming = Path(script_args.dataset_name), script_args.dataset_streaming
    if path.suffix in LINES and path.is_file():
        kind, dataset_dict = (IterableDataset, IterableDatasetDict) if streaming else (Dataset, DatasetDict)
        given = {"path": str(path), "mtime": path.stat().st_mtime}
        with naming(path):
            rows = kind.from_generator(_examples_for_arrow, gen_kwargs=given)
        return dataset_dict({script_args.dataset_train_split: rows})
    if path.suffix in TABLES and path.is_file():
        files = {script_args.dataset_train_split: str(path)}
        with naming(path):
            return load_dataset(TABLES[path.suffix], data_files=files, streaming=streaming)
    if path.suffix in (*LINES, *TABLES):
        raise ValueError(f"There is no file {path}.")
    return load_dataset(script_args.dataset_name, name=script_args.dataset_config, streaming=streaming)


def _check_belongs(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> None:
    """Refuse settings of a mixture beside a single dataset, and the other way round: nobody would read them."""
    if dataset_args.datasets:
        if script_args.dataset_streaming:
            raise ValueError("dataset_streaming=True has no effect on a mixture (`datasets`). Use streaming=True.")
    elif dataset_args.streaming:
        raise ValueError("streaming=True is for a mixture (`datasets`). Use dataset_streaming=True for a dataset.")
    elif dataset_args.test_split_size is not None:
        raise ValueError(
            f"test_split_size={dataset_args.test_split_size} is for a mixture (`datasets`). Split a dataset yourself, "
            "and name the split with dataset_test_split."
        )


def _examples_for_arrow(path: str, mtime: float) -> Iterator[dict[str, Any]]:
    """Encode values that differ in shape between examples as JSON: Arrow would refuse them or fill them up."""
    del mtime  # an argument only for the cache, which would not notice that the file has changed
    examples = JsonLines(Path(path))
    # `datasets` would take the columns of the first example only.
    absent = dict.fromkeys(name for example in examples for name in example)
    for example in map(_with_json_arguments, examples):
        as_json = {name: _as_json(example[name]) for name in ("tools", "chat_template_kwargs") if example.get(name)}
        yield {**absent, **example, **as_json}


def _with_json_arguments(value: Any) -> Any:
    """Return a value with the arguments of all tool calls in it encoded as JSON."""
    if isinstance(value, list):
        return [_with_json_arguments(item) for item in value]
    if isinstance(value, dict):
        return {
            key: _as_json(item) if key == "arguments" and isinstance(item, dict) else _with_json_arguments(item)
            for key, item in value.items()
        }
    return value


def _as_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def get_split(dataset: DatasetDict | IterableDatasetDict, name: str) -> Dataset | IterableDataset:
    """Return a split; raise a `ValueError` that names the others if there is none of this name."""
    if name not in dataset:
        raise ValueError(f"The dataset has no split '{name}', only {', '.join(dataset)}.")
    return dataset[name]
