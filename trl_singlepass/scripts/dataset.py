"""The dataset that the command line of a training script names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..data.files import LINES, TABLES, JsonLines, naming


def load_splits(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """
    Return the splits of a file, a folder, a dataset on the Hub, or a mixture, by name. A file has the one for
    training.

    A mixture in `dataset_args` takes precedence over the dataset that `script_args` names. If none is named, there is
    no such file, or a setting belongs to the other of the two, this raises `ValueError`.
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


def name_on_hub(dataset_name: str | None) -> str | None:
    """Return the name if a model card may link to it: not that of a file or folder."""
    return None if dataset_name is None or Path(dataset_name).exists() else dataset_name


def get_split(dataset: DatasetDict | IterableDatasetDict, name: str) -> Dataset | IterableDataset:
    """Return a split; raise a `ValueError` that names the others if there is none of this name."""
    if name not in dataset:
        raise ValueError(f"The dataset has no split '{name}', only {', '.join(dataset)}.")
    return dataset[name]
