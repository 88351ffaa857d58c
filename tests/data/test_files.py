"""Files and folders as examples."""

from pathlib import Path

import datasets
import pytest

from support.chat_tokenizers import make_tokenizer
from support.small_files import examples, write_examples
from trl_singlepass.data.files import JsonLines, load_examples
from trl_singlepass.rendering.samples import render_example


def test_json_lines_are_read_as_they_are(tmp_path):
    loaded = JsonLines(Path(write_examples(tmp_path / "rows.jsonl")))
    assert (len(loaded), list(loaded), loaded[1:3]) == (4, examples(), examples()[1:3])


@pytest.mark.parametrize("kind", ["parquet", "folder", "split folder", "json"])
def test_other_files_and_folders(kind, tmp_path):
    plain = datasets.Dataset.from_list(examples()[:2])
    path = tmp_path / ("x." + kind if kind in ("parquet", "json") else "x")
    if kind == "parquet":
        plain.to_parquet(path)
    elif kind == "json":
        plain.to_json(path)
    elif kind == "folder":
        plain.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": plain}).save_to_disk(path)
        with pytest.raises(ValueError, match="has no split 'test', only train"):
            load_examples(str(path), split="test")
    loaded = load_examples(str(path))
    tokenizer = make_tokenizer()
    expected = [len(sample) for sample in render_example(examples()[0], tokenizer)]
    assert [len(sample) for sample in render_example(dict(loaded[0]), tokenizer)] == expected
