"""docs/internals.md lists what the trainer overrides: the list is held against its classes and their bases."""

import inspect
import re
from pathlib import Path

import pytest
from trl import SFTTrainer

from support.trainers import overridden, own_classes
from trl_singlepass import SinglePassSFTTrainer


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "internals.md").read_text()
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]


def test_the_page_lists_each_overridden_method_once():
    assert sorted(row[0].strip("`") for row in TABLE) == sorted(overridden(SinglePassSFTTrainer))


@pytest.mark.parametrize("method", [row[0].strip("`") for row in TABLE if row[0] != "`__init__`"])
def test_an_override_takes_the_arguments_of_the_method_and_says_why_it_is_there(method):
    inherited = inspect.signature(getattr(SFTTrainer, method)).parameters.values()
    for ours in (vars(cls)[method] for cls in own_classes(SinglePassSFTTrainer) if method in vars(cls)):
        own = inspect.signature(ours).parameters.values()
        if inspect.Parameter.VAR_POSITIONAL not in {parameter.kind for parameter in own}:
            assert [(item.name, item.default) for item in own] == [(item.name, item.default) for item in inherited]
        lines = inspect.getdoc(ours).splitlines()
        assert len(lines) == 1
        assert re.fullmatch(r"[A-Z][^;]+; [^;]+\.", lines[0]), "what it changes; why the original is not enough"
