"""Rules that no linter checks: the size of files, docstrings that list every argument, imports without torch."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.trainers import own_settings
from trl_singlepass import SinglePassDPOConfig, SinglePassSFTConfig


PACKAGE = Path(__file__).parents[2] / "trl_singlepass"
FILES = sorted(PACKAGE.rglob("*.py"))
SECTIONS = "Returns|Raises|Yields|Examples?|Source|Note"
WITHOUT_TORCH = ["trees.prefix_tree", "trees.rows", "trees.sharing", "rendering.samples", "cost", "reports.tree_plots"]


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_data_modules_do_not_import_torch(module):
    code = f"import sys, trl_singlepass.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


def public_callables():
    """Yield the AST node of every function and class that the reference of the API lists."""
    exported = set(re.findall(r"^::: (\S+)$", (PACKAGE.parent / "docs" / "reference.md").read_text(), re.M))
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            if f"{name_of(path)}.{node.name}" not in exported:
                continue
            yield pytest.param(node, id=f"{name_of(path)}.{node.name}")


def arguments(node):
    """Return the names of arguments: of a function, of `__init__`, or the fields of a dataclass."""
    if isinstance(node, ast.ClassDef):
        init = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not init:
            is_dataclass = any("dataclass" in ast.unparse(item) for item in node.decorator_list)
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)] if is_dataclass else []
            return [item.target.id for item in fields]
        node = init[0]
    spec = node.args
    names = [argument.arg for argument in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]]
    names += [argument.arg for argument in (spec.vararg, spec.kwarg) if argument]
    return [name for name in names if name != "self"]


def state(node):
    """Return the fields of a dataclass that callers do not pass: a docstring may leave them out."""
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and item.value is not None]
    return {item.target.id for item in fields if re.search("default_factory|init=False", ast.unparse(item.value))}


def documented(docstring):
    """Return the argument names in the `Args:` section of a Hugging Face docstring."""
    section = re.search(rf"^Args:\n(.*?)(?=^(?:{SECTIONS}):|\Z)", docstring, re.S | re.M)
    if section is None:
        return None
    lines = section.group(1).splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return re.findall(rf"^ {{{indent}}}\*{{0,2}}(\w+) \(", section.group(1), re.M)


@pytest.mark.parametrize("node", list(public_callables()))
def test_docstrings_list_the_arguments_of_the_signature(node):
    names, expected = documented(ast.get_docstring(node) or ""), arguments(node)
    if names is None:  # a one-line docstring may leave its arguments to the types
        return
    if isinstance(node, ast.ClassDef):
        expected = [name for name in expected if name in names or name not in state(node)]
        if node.bases:
            names = [name for name in names if name in expected]  # the others are inherited
    assert names == expected


@pytest.mark.parametrize("config", [SinglePassSFTConfig, SinglePassDPOConfig])
def test_docstrings_of_configurations_list_the_settings_that_they_share_as_well(config):
    assert sorted(documented(inspect.getdoc(config))) == sorted(own_settings(config))
