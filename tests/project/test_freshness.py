"""A file of measured figures is as new as the code that it measures."""

import ast
import importlib
import json
from pathlib import Path

import pytest

from benchmarks import freshness
from benchmarks.freshness import FIGURES, RESULTS, ROOT, Figures, changed, code_of, kind_of, measure


FILES = sorted(RESULTS.glob("*.json"))
COMMANDS = {kind: figures for kind, figures in FIGURES.items() if not figures.exempt}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_is_older_than_its_code(path):
    assert changed(path) == [], f"run `python -m {FIGURES[kind_of(path)].command}`, or `make results` for all"


CODE = '''
"""A room."""

def step():
    """Take a step."""
    return f"{1}"  # a comment
'''


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Measured code of one file, and the file of its figures."""
    monkeypatch.setattr(freshness, "ROOT", tmp_path)
    monkeypatch.setitem(FIGURES, "speed", Figures("speed", "room"))
    folder = tmp_path / "trl_singlepass" / "room"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "speed.py").touch()
    (folder / "step.py").write_text(CODE)
    (tmp_path / "speed.json").write_text(json.dumps({"kind": "speed", "code": code_of("speed")}))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "is_stale"),
    [
        ("step.py", CODE, False),
        ("step.py", CODE.replace("a comment", "words").replace("Take", "Takes").replace("A room", "The room"), False),
        ("step.py", CODE.replace("1", "2"), True),
        ("other.py", "", True),
        ("sizes.json", "[]", True),
        ("inner/step.py", CODE, False),  # a path of its own
    ],
)
def test_code_makes_a_file_stale_and_words_do_not(room, name, content, is_stale):
    (room / name).write_text(content)
    assert changed(room.parents[1] / "speed.json") == (["trl_singlepass/room"] if is_stale else [])


def test_a_file_without_an_entry_is_an_error(tmp_path):
    (path := tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other has no entry"):
        kind_of(path)
    assert {kind_of(path) for path in FILES} <= FIGURES.keys()


def imports_of(module):
    """The paths that a module imports of the package and of the benchmarks."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("trl_singlepass", "benchmarks"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            paths = [name.replace(".", "/") for name in names if "." in name]
            yield from (path + end for path in paths for end in ("", ".py") if (ROOT / (path + end)).exists())


def is_part(name, path):
    """Whether a path is a file of another, or has parts there."""
    return name == path or str(Path(name).parent) == path or path.startswith(f"{name}/")


# Load, draw and write.
PLUMBING = (
    *(f"benchmarks/{name}.py" for name in ("machine", "report", "apart", "freshness")),
    "trl_singlepass/cli/loading.py",
    "trl_singlepass/reports",
)


MODULES = sorted({figures.module for figures in COMMANDS.values()})


@pytest.mark.parametrize("module", MODULES)
def test_paths_exist_and_hold_what_the_benchmark_imports(module):
    paths = [path for figures in COMMANDS.values() if figures.module == module for path in figures.paths]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    measured = (name for name in imports_of(paths[0]) if not name.startswith(PLUMBING))
    assert {name for name in measured if not any(is_part(name, path) for path in paths)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_commands_take_their_options(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(module).main()
    shown = capsys.readouterr().out
    options = {word for figures in COMMANDS.values() if figures.module == module for word in figures.command.split()}
    assert [word for word in options if word.startswith("--") and word not in shown] == []


def test_missing_data_is_named(monkeypatch):
    monkeypatch.setitem(FIGURES, "speed", Figures("benchmarks.freshness nothing {data}", ""))
    assert measure("speed", {"data": ""}) == "needs --data"
