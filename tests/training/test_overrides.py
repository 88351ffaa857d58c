"""docs/internals.md lists what the trainer overrides: the list is held against the class and against its bases."""

import inspect
import re
from pathlib import Path

import pytest
from trl import SFTTrainer

from trl_singlepass import SinglePassSFTTrainer


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "internals.md").read_text()
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]


def methods(cls):
    return {name for name, member in vars(cls).items() if inspect.isfunction(member)}


def overridden(cls):
    """Names of the methods that a class defines and some class above it has as well, in the order of the class."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    return [name for name, member in vars(cls).items() if inspect.isfunction(member) and name in inherited]


def test_the_page_lists_the_overridden_methods_in_the_order_of_the_class():
    assert [row[0].strip("`") for row in TABLE] == overridden(SinglePassSFTTrainer)


def test_other_methods_have_names_that_no_base_uses():
    own = {"_check_model", "_enable_tree", "_epoch", "_without_repeats"}
    assert methods(SinglePassSFTTrainer) - set(overridden(SinglePassSFTTrainer)) == own


@pytest.mark.parametrize(("method", "library"), [(row[0].strip("`"), row[1]) for row in TABLE])
def test_the_page_names_the_library_whose_method_runs_without_ours(method, library):
    owner = next(cls for cls in SFTTrainer.__mro__ if method in vars(cls))
    assert owner.__module__.split(".")[0] == library.lower()


@pytest.mark.parametrize("method", [row[0].strip("`") for row in TABLE if row[0] != "`__init__`"])
def test_an_override_takes_the_arguments_of_the_method_and_says_why_it_is_there(method):
    ours, theirs = getattr(SinglePassSFTTrainer, method), getattr(SFTTrainer, method)
    own, inherited = (inspect.signature(function).parameters.values() for function in (ours, theirs))
    kinds = {parameter.kind for parameter in own}
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        assert [(item.name, item.default) for item in own] == [(item.name, item.default) for item in inherited]
    lines = inspect.getdoc(ours).splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"[A-Z][^;]+; [^;]+\.", lines[0]), "what it changes; why the original is not enough"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].strip("`"))
def test_every_row_gives_a_difference_a_reason_and_helpers_that_exist(row):
    _, _, difference, reason, helpers = row
    assert len(difference.split()) >= 3
    assert len(reason.split()) >= 4
    for helper in re.findall(r"`([\w./]+)`", helpers):
        assert (ROOT / "trl_singlepass" / "training" / helper).is_file()
