"""
Train as `trl sft` does, with every turn of a conversation exact in one pass.

```bash
accelerate launch -m trl_singlepass.scripts.sft \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name data.jsonl \
    --output_dir out
```
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..data.files import LINES, TABLES, JsonLines
from ..training.checkpoints import checkpoint_to_resume
from ..training.config import SinglePassSFTConfig
from ..training.preemption import PreemptionCallback
from ..training.trainer import SinglePassSFTTrainer


DATACLASSES = (ScriptArguments, SinglePassSFTConfig, ModelConfig, DatasetMixtureConfig)


def main(
    script_args: ScriptArguments,
    training_args: SinglePassSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Train a model, as `trl.scripts.sft` does."""
    given = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {**_model_kwargs(model_args, training_args), **given}
    dataset = _load_dataset(script_args, dataset_args)
    wants_evaluation = training_args.eval_strategy != "no"
    preemption = PreemptionCallback()
    trainer = SinglePassSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=_get_split(dataset, script_args.dataset_train_split),
        eval_dataset=_get_split(dataset, script_args.dataset_test_split) if wants_evaluation else None,
        peft_config=get_peft_config(model_args),
        callbacks=[preemption],
    )
    checkpoint = checkpoint_to_resume(training_args.resume_from_checkpoint, training_args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if preemption.was_preempted:
        trainer.accelerator.print("Stopped by a signal. --resume_from_checkpoint auto resumes the run.")
        return
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    trainer.create_model_card(
        model_name=Path(training_args.output_dir).name, dataset_name=_name_on_hub(script_args.dataset_name)
    )
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def make_parser(prog: str | None = None, parser_class: type[TrlParser] = TrlParser, **kwargs: Any) -> TrlParser:
    """Return the parser of the script's arguments."""
    return parser_class(DATACLASSES, prog=prog, **kwargs)


def _model_kwargs(model_args: ModelConfig, training_args: SinglePassSFTConfig) -> dict[str, object]:
    owner = training_args if hasattr(training_args, "trust_remote_code") else model_args  # moved in TRL 1.12
    kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": owner.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    return kwargs


def _load_dataset(
    script_args: ScriptArguments, dataset_args: DatasetMixtureConfig
) -> DatasetDict | IterableDatasetDict:
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if not script_args.dataset_name:
        raise ValueError(
            "No data: pass a file, a folder or a hub id as --dataset_name, or list `datasets` in the --config file."
        )
    path, streaming = Path(script_args.dataset_name), script_args.dataset_streaming
    if path.suffix in LINES and path.is_file():
        kind, dataset_dict = (IterableDataset, IterableDatasetDict) if streaming else (Dataset, DatasetDict)
        rows = kind.from_generator(_examples_for_arrow, gen_kwargs={"path": str(path), "mtime": path.stat().st_mtime})
        return dataset_dict({script_args.dataset_train_split: rows})
    if path.suffix in TABLES and path.is_file():
        files = {script_args.dataset_train_split: str(path)}
        return load_dataset(TABLES[path.suffix], data_files=files, streaming=streaming)
    if path.suffix in (*LINES, *TABLES):
        raise ValueError(f"There is no file {path}.")
    return load_dataset(script_args.dataset_name, name=script_args.dataset_config, streaming=streaming)


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


def _name_on_hub(dataset_name: str | None) -> str | None:
    """Return the name if a model card may link to it: not that of a file or folder."""
    return None if dataset_name is None or Path(dataset_name).exists() else dataset_name


def _get_split(dataset: DatasetDict | IterableDatasetDict, name: str) -> Dataset | IterableDataset:
    if name not in dataset:
        raise ValueError(f"The dataset has no split '{name}', only {', '.join(dataset)}.")
    return dataset[name]


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
