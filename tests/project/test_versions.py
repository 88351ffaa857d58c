"""What the project relies on in other libraries is listed, recorded for known releases, and unchanged in these."""

import ast
import zipfile
from functools import cache
from pathlib import Path

import pytest

from support.trainers import overridden
from trl_singlepass import SinglePassDPOTrainer, SinglePassSFTTrainer
from versions import guard, report
from versions.relied_on import PRIVATE
from versions.sources import digest, in_wheel, installed


ROOT = Path(__file__).parents[2]
TREES = [ast.parse(path.read_text()) for path in (ROOT / "trl_singlepass").rglob("*.py")]
# Of PyTorch, datasets, flash-attn and the standard library.
OTHERS = {
    *(
        "_C",
        "_current_graph_task_id",
        "_dynamo",
        "_DropoutNd",
        "_fingerprint",
        "_actions",
        "_option_string_actions",
        "_exit",
    ),
    *(f"_scaled_dot_product_flash_attention{end}" for end in ("", "_backward", "_for_cpu", "_for_cpu_backward")),
    *(f"_flash_attn_{way}" for way in ("forward", "backward", "varlen_forward", "varlen_backward")),
    "_flash_attention_backward",  # of ATen, as `_flash_attention_forward` is as well
}
# Attributes of classes and configurations that hold no code, and that transformers documents for its models.
DOCUMENTED = {"_supports_sdpa", "_name_or_path"}


def names_of_the_project():
    """Every name that the package defines or assigns."""
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def private_names():
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (alias.name for alias in node.names)


def test_every_private_name_that_is_read_is_listed():
    private = {name for name in private_names() if name.startswith("_") and not name.startswith("__")}
    foreign = private - set(names_of_the_project())
    assert foreign - OTHERS - DOCUMENTED <= set(PRIVATE)


@cache
def digests(package):
    return guard.digests_of(package, installed(package)[1])


@pytest.mark.parametrize("package", guard.PACKAGES)
def test_an_installed_release_changes_nothing_that_is_relied_on(package):
    version, _ = installed(package)
    changes = guard.changes(package, version, digests(package), record := guard.read_record())
    if version not in record[package]:
        pytest.skip(f"{package} {version} is not recorded. {'; '.join(changes) or 'Nothing has changed'}")
    assert changes == []


def test_overridden_methods_are_found_in_a_class_above():
    found = {name.rpartition(".")[2] for package in ("transformers", "trl") for name in digests(package)}
    for trainer in (SinglePassSFTTrainer, SinglePassDPOTrainer):
        assert overridden(trainer) <= found


CODE = '''
class Trainer:
    """Trains."""

    def step(self):
        """Take a step."""
        return {value}  # a comment
'''


def wheel(folder, version, value):
    path = folder / f"library-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("library/trainer.py", CODE.format(value=value))
    return in_wheel(path)


def test_a_release_that_changes_a_method_is_reported_by_name(tmp_path):
    version, read = wheel(tmp_path, "1.0.0", 1)
    name = "library.trainer.Trainer.step"
    record = {"library": {version: {name: digest(name, read)}}}
    assert version == "1.0.0"
    assert record["library"][version][name] is not None
    for version, value, expected in (
        ("1.1.0", 1, []),
        ("1.2.0", 2, [f"{name} changed (library 1.0.0 → 1.2.0)"]),
    ):
        _, read = wheel(tmp_path, version, value)
        assert guard.changes("library", version, {name: digest(name, read)}, record) == expected
    assert guard.changes("library", "2.0.0", {name: None}, record) == [f"{name} is gone (library 1.0.0 → 2.0.0)"]


def test_pages_print_the_recorded_results():
    results = report.read_results()
    assert {"1.10.0"} < {one["versions"]["trl"] for one in results}
    assert not any(one["failed"] for one in results)
    for path, text in report.PAGES.items():
        page = path.read_text()
        assert page.count(report.BEGIN) == page.count(report.END) == 1
        assert report.with_results(page, text(results)) == page
