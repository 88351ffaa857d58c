"""Recipes are listed, printed and written as they are in the repository."""

import re
from pathlib import Path

import pytest

from trl_singlepass.cli import file_commands


FOLDER = Path(__file__).parents[2] / "recipes"


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "README.md"
    }


def test_every_recipe_is_listed_with_what_it_is_for(run):
    code, out, _ = run("recipes")
    assert code == 0
    listed = dict(re.fullmatch(r"(\S+) *(.*)", line).groups() for line in out.splitlines())
    assert len(listed) == len(files(FOLDER))
    assert all(listed[path.stem] for path in FOLDER.glob("*.yaml"))
    assert out.startswith("cpu-smoke ")


@pytest.mark.parametrize(
    "name", ["cpu-smoke", "cpu-smoke.yaml", "accelerate/fsdp2", "deepspeed/zero3.json", "slurm/train.sh"]
)
def test_a_recipe_is_printed_as_it_is(run, name):
    path = FOLDER / name if (FOLDER / name).exists() else FOLDER / f"{name}.yaml"
    assert run("recipes", name) == (0, path.read_text(), "")


def test_all_are_written(run, tmp_path):
    assert run("recipes", "-o", tmp_path / "recipes")[0] == 0
    assert files(tmp_path / "recipes") == files(FOLDER)


def test_a_changed_file_stops_it_before_anything_is_written(run, tmp_path):
    (tmp_path / "cpu-smoke.yaml").write_text("mine: true\n")
    code, _, err = run("recipes", "-o", tmp_path)
    assert code == 2
    assert "cpu-smoke.yaml would be overwritten" in err
    assert files(tmp_path) == {"cpu-smoke.yaml": b"mine: true\n"}


def test_files_that_are_the_same_stay(tmp_path):
    file_commands.write_recipes(str(tmp_path))
    assert file_commands.write_recipes(str(tmp_path)).startswith("Wrote 0 files")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "There is no recipe 'none', only cpu-smoke, "),
        (["../pyproject.toml"], "There is no recipe"),
        (["cpu-smoke", "-o", "x"], "not both"),
    ],
)
def test_errors(run, arguments, message):
    code, out, err = run("recipes", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_every_recipe_says_what_it_is_for():
    assert not [line for line in file_commands.list_recipes().splitlines() if len(line.split()) < 3]
