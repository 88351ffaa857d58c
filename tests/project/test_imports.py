"""Imports go one way: between folders of the package, between its files, and from tests to what they share."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trl_singlepass"
TESTS = ROOT / "tests"
FILES = sorted(PACKAGE.rglob("*.py"))
# A folder imports itself and folders of smaller ranks; folders of one rank do not import each other.
RANKS = {
    "trees": 0,
    "images": 1,
    "rendering": 2,
    "cost": 2,
    "data": 3,
    "attention": 3,
    "recurrent": 4,
    "engine": 6,
    "training": 7,
    "groups": 8,
    "preference": 8,
    "reference": 9,
    "reports": 9,
    "scripts": 9,
    "cli": 10,
}
VERSION = "trl_singlepass.__version__"  # the only name that folders may import from the package itself


def name_of(path):
    """`trl_singlepass/attention/sdpa.py` -> `trl_singlepass.attention.sdpa`; a package has the name of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path):
    """Modules of the package that a file imports, at any place of it and for type checking as well, as full names."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module not in MODULES:
                continue
            names = {f"{module}.{alias.name}" for alias in node.names} - {VERSION}
            yield from names & MODULES.keys()
            if names - MODULES.keys():
                yield module


def folder_of(module):
    """`trl_singlepass.attention.sdpa` -> `attention`."""
    return module.split(".")[1]


def test_folders_import_one_way():
    upwards = [
        f"{own} imports {module}"
        for own, path in MODULES.items()
        if own != PACKAGE.name
        for module in imports_of(path)
        if folder_of(module) != folder_of(own) and RANKS[folder_of(module)] >= RANKS[folder_of(own)]
    ]
    assert not upwards


def test_no_circle_of_files():
    graph = {module: set(imports_of(path)) - {module} for module, path in MODULES.items() if module != PACKAGE.name}
    before = None
    while before != graph:  # take away files that import nothing of what is left, or are imported by nothing of it
        before = graph
        imported = set().union(*graph.values())
        graph = {
            module: modules & graph.keys()
            for module, modules in graph.items()
            if modules & graph.keys() and module in imported
        }
    assert not graph, f"these files import each other: {graph}"


def test_every_folder_has_a_rank():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert entries == set(RANKS)


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w./])(?:\w+/)+(?:\w+\.(?:py|md))?", text)
    assert len(paths) > 20
    assert [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()] == []


def test_tests_import_nothing_of_a_test_file():
    tests = {test.stem for test in TESTS.rglob("*.py") if test.stem.startswith(("test_", "conftest"))}
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            parts = {part for name in names for part in name.split(".")}
            assert not parts & tests, f"{path.relative_to(TESTS)} imports a test file: share it in tests/support/"
