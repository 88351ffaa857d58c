"""A folder like the repository, with a model and data that train in a second, to run the docs' commands in."""

import os
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from accelerate import PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from demo.load import load_tokenizer
from support.trainers import float32_model
from trl_singlepass.cli import demo
from trl_singlepass.cli.demo import DATA, write_demo_pairs


ROOT = Path(__file__).parents[2]
# Where the docs tell readers to write them.
DEMO_MODEL, DEMO_DATA = Path("out/demo-model"), Path("out/demo-data.jsonl")
DEMO_PAIRS = Path("out/demo-pairs.jsonl")
FEW_ROWS = "few-rows.jsonl"
NUM_ROWS = 2  # the shortest with tool calls, and as many of the shortest without


def make_small_repository(folder):
    """Fill a folder with links to the repository, a few of its conversations, and a tinier model than the demo's."""
    for path in ROOT.iterdir():
        if path.name not in ("out", ".git"):
            (folder / path.name).symlink_to(path)
    rows = DATA.read_text().splitlines(keepends=True)
    by_kind = [[row for row in rows if ('"tool_calls"' in row) == calls] for calls in (True, False)]
    shortest = [row for kind in by_kind for row in sorted(kind, key=len)[:NUM_ROWS]]
    (folder / "out").mkdir()
    for path in (folder / FEW_ROWS, folder / DEMO_DATA):
        path.write_text("".join(shortest))
    with mock.patch.object(demo, "DATA", folder / FEW_ROWS):
        write_demo_pairs(str(folder / DEMO_PAIRS))
    tokenizer = load_tokenizer(None)
    for part in (float32_model(tokenizer), tokenizer):
        part.save_pretrained(folder / DEMO_MODEL)
    return folder


@contextmanager
def as_a_reader(folder):
    """Enter that folder with the variables that the docs ask for; undo what commands leave behind in this process."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.chdir(folder)
        patch.setattr(demo, "DATA", folder / FEW_ROWS)
        os.environ.update(MODEL=str(DEMO_MODEL), NODE_RANK="0")
        yield patch
    unset_hf_deepspeed_config()
    PartialState._reset_state()


def run_python(arguments, patch):
    """Run `python` with these arguments in this process."""
    patch.setattr(sys, "argv", arguments[arguments[0] == "-m" :])
    if arguments[0] == "-m":
        patch.delitem(sys.modules, arguments[1], raising=False)  # as in a fresh interpreter
        runpy.run_module(arguments[1], run_name="__main__")
    else:
        runpy.run_path(arguments[0], run_name="__main__")
