"""MODEL and DATA of the command line: a local path, a file, or a hub id, to tokenizer, model and rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.utils.tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


LINES, TABLES = (".jsonl", ".ndjson"), {".parquet": "parquet", ".json": "json", ".csv": "csv", ".arrow": "arrow"}


class JsonLines(Sequence[dict[str, Any]]):
    """
    Rows of a JSON Lines file, each read when it is asked for.

    Reading them through Arrow would give all structs of a column the same keys, and refuse a column that is a string
    in one row and an object in another, as tool-call arguments often are.

    Args:
        path (`Path`):
            The file.

    Raises:
        `ValueError`: If the file is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: list[int] = []
        with (
            path.open("rb") as file,
            tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="Reading") as bar,
        ):
            start = 0
            for line in file:
                if line.strip():
                    self.offsets.append(start)
                start += len(line)
                bar.update(len(line))
        if not self.offsets:
            raise ValueError(f"{path} is empty. Expected one JSON object per line.")

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, row {index}: no JSON ({error}). Expected one object per line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, row {index}: expected a JSON object, got {type(row).__name__}.")
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def load_rows(data: str, *, split: str = "train", config: str | None = None) -> Sequence[Any] | Dataset:
    """
    Return the conversations that DATA names.

    Args:
        data (`str`):
            A `.jsonl`, `.json`, `.parquet`, `.csv` or `.arrow` file, a folder of such files or of `save_to_disk`, or a
            dataset of the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder or of a dataset of the Hub.
        config (`str`, *optional*):
            Configuration of a dataset of the Hub.

    Returns:
        `datasets.Dataset` or [`JsonLines`]: The rows.

    Raises:
        `ValueError`: If there is no such data.
    """
    path = Path(data).expanduser()
    if path.suffix in LINES and path.is_file():
        return JsonLines(path)
    if path.is_file():
        if path.suffix not in TABLES:
            raise ValueError(
                f"{data} is none of {', '.join([*LINES, *TABLES])}. Convert it, or rename it if it is one."
            )
        return load_dataset(TABLES[path.suffix], data_files=str(path), split="train")
    if path.suffix in (*LINES, *TABLES):
        raise ValueError(f"There is no file {data}.")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _split_of(load_from_disk(str(path)), split, data)
    return _from_hub(data, split, config)


def _split_of(dataset: Dataset | DatasetDict, split: str, data: str) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    if split not in dataset:
        raise ValueError(f"{data} has no split '{split}', only {', '.join(dataset)}. Choose one with --split.")
    return dataset[split]


def _from_hub(data: str, split: str, config: str | None) -> Dataset:
    try:
        return load_dataset(data, name=config, split=split)
    except Exception as error:  # the Hub client raises what it likes
        raise ValueError(
            f"{data} is neither a file nor a dataset that can be loaded: {first_line(error)} Expected a .jsonl or "
            ".parquet file, a folder, or the id of a dataset on the Hub."
        ) from error


def load_tokenizer(model: str, *, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """
    Return the tokenizer of a model.

    Args:
        model (`str`):
            Folder or hub id.
        chat_template (`str`, *optional*):
            File with a chat template to use instead of the tokenizer's own.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer, with a chat template.

    Raises:
        `ValueError`: If there is no such model, or no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ValueError(_no_model(model, error)) from error
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise ValueError(f"There is no file {chat_template}. --chat_template takes a file with a Jinja template.")
        tokenizer.chat_template = Path(chat_template).read_text("utf-8")
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {model} has no chat template. Give one with --chat_template FILE.")
    return tokenizer


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model; `None` where the folder holds only a tokenizer."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ValueError(_no_model(model, error)) from error


def load_model(
    model: str, *, dtype: str, attn_implementation: str | None, device: str, trust_remote_code: bool = False
) -> Any:
    """
    Return a causal language model, in training mode.

    Args:
        model (`str`):
            Folder or hub id.
        dtype (`str`):
            Precision of the weights.
        attn_implementation (`str`, *optional*):
            Attention kernel.
        device (`str`):
            Device to load it to.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the model may run.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        `ValueError`: If it cannot be loaded.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # as above
        raise ValueError(_no_model(model, error)) from error
    return loaded.to(device).train()


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the beginning of an error's text in one line, as a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."


def _no_model(model: str, error: Exception) -> str:
    return (
        f"{model} cannot be loaded: {first_line(error)} Expected a folder with a model, or the id of one on the Hub."
    )
