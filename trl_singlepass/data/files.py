"""Load what DATA names on the command line: a file, a folder or a dataset on the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, overload

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.utils.tqdm import tqdm

from ..trees.errors import first_line


LINES, TABLES = (".jsonl", ".ndjson"), {".parquet": "parquet", ".json": "json", ".csv": "csv", ".arrow": "arrow"}


class JsonLines(Sequence[dict[str, Any]]):
    """
    Examples of a JSON Lines file, each read when it is asked for.

    Arrow would give all structs of a column the same keys, and refuse a column that is a string in one example and an
    object in another, as tool-call arguments often are.

    An empty file is a `ValueError`.
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
            example = json.loads(line)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, row {index}: not JSON ({error}). Expected one object per line.") from error
        if not isinstance(example, dict):
            raise ValueError(f"{self.path}, row {index}: expected a JSON object, got {type(example).__name__}.")
        return example

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file `datasets` cannot read, and why, as a `ValueError`; its own error says neither."""
    try:
        yield
    except DatasetGenerationError as error:
        cause = error.__cause__
        if not isinstance(cause, ValueError | TypeError):  # what parsers and Arrow raise about a file
            raise
        if str(path) in str(cause):  # from `JsonLines`
            raise cause from None
        if isinstance(cause, UnicodeDecodeError) or isinstance(cause.__context__, UnicodeDecodeError):
            raise _not_utf8(path) from error
        raise ValueError(f"{path} cannot be read: {first_line(cause)} Repair it, or convert it to .jsonl.") from error


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Say which folder has no room left, and remove what `datasets` leaves unfinished there when it cannot write."""
    before = set(folder.glob("tmp*"))
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        for unfinished in set(folder.glob("tmp*")) - before:
            unfinished.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"There is no room left for prepared rows in {folder}. Free some, or set HF_DATASETS_CACHE to a folder "
            "on another disk",
        ) from error


def _not_utf8(path: Path) -> ValueError:
    return ValueError(f"{path} is not encoded in UTF-8. Convert it; Latin-1 with iconv -f latin1 -t utf-8 OLD > NEW.")


def load_examples(data: str, *, split: str = "train", config: str | None = None) -> Sequence[Any] | Dataset:
    """
    Return the examples that DATA names, or raise `ValueError` if there are none.

    DATA is a `.jsonl`, `.json`, `.parquet`, `.csv` or `.arrow` file, a folder of such files or of `save_to_disk`, or a
    dataset on the Hub. `split` is one of a folder or of a dataset on the Hub, `config` a configuration of the latter.
    """
    path = Path(data).expanduser()
    if path.suffix in LINES and path.is_file():
        return JsonLines(path)
    if path.is_file():
        if path.suffix not in TABLES:
            raise ValueError(
                f"Expected a file that ends in {', '.join([*LINES, *TABLES])}, got {data}. Convert it, or rename it "
                "if it has one of these formats."
            )
        with naming(path):
            return load_dataset(TABLES[path.suffix], data_files=str(path), split="train")
    if path.suffix in (*LINES, *TABLES):
        raise ValueError(f"There is no file {data}.")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _get_split(load_from_disk(str(path)), split, data)
    return _load_from_hub(data, split, config)


def _get_split(dataset: Dataset | DatasetDict, split: str, data: str) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    if split not in dataset:
        raise ValueError(f"{data} has no split '{split}', only {', '.join(dataset)}. Choose one with --split.")
    return dataset[split]


def _load_from_hub(data: str, split: str, config: str | None) -> Dataset:
    try:
        return load_dataset(data, name=config, split=split)
    except Exception as error:  # the Hub client may raise any exception
        raise ValueError(
            f"{data} is neither a file nor a dataset that can be loaded: {first_line(error)} Expected a .jsonl or "
            ".parquet file, a folder, or the id of a dataset on the Hub."
        ) from error
