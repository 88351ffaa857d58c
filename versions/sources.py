"""Source of functions and classes of other libraries, from an installed package or a wheel, without importing it."""

from __future__ import annotations

import ast
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """Files of a package, by their paths (`trl/trainer/sft_trainer.py`)."""

    paths: tuple[str, ...]
    read: Callable[[str], str | None]

    def __call__(self, path: str) -> str | None:
        """Return the content of a file; `None` if there is none."""
        return self.read(path)


@cache
def installed(package: str) -> tuple[str, Files]:
    """Return the version of an installed package, and its files."""
    distribution = metadata.distribution(package)

    def read(path: str) -> str | None:
        file = Path(str(distribution.locate_file(path)))
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return distribution.version, Files(tuple(sorted(map(str, distribution.files or ()))), cache(read))


def in_wheel(path: Path) -> tuple[str, Files]:
    """Return the version of a wheel, and its files; of a source archive (`.tar.gz`), likewise."""
    if path.suffix == ".whl":
        archive = zipfile.ZipFile(path)
        names = tuple(sorted(archive.namelist()))
        read_one = cache(lambda name: archive.read(name).decode() if name in names else None)
        return path.name.split("-")[1], Files(names, read_one)
    import tarfile

    sources = tarfile.open(path)  # noqa: SIM115 - read as long as the reader lives
    stem = path.name.removesuffix(".tar.gz")
    members = {name.partition("/")[2].removeprefix("src/"): name for name in sources.getnames()}

    def read(name: str) -> str | None:
        file = sources.extractfile(members[name]) if name in members else None
        return None if file is None else file.read().decode()

    return stem.rpartition("-")[2], Files(tuple(sorted(members)), cache(read))


def digest(name: str, read: Files) -> str | None:
    """
    Return a hash of the code of a function, method or class.

    Comments, docstrings and layout do not count.

    Args:
        name (`str`):
            Dotted name, from the package on.
        read (`Files`):
            Files of the package.

    Returns:
        `str` or `None`: Sixteen hexadecimal digits; `None` if there is no such code.
    """
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        for path in ("/".join(parts[:length]) + ".py", "/".join((*parts[:length], "__init__.py"))):
            if (source := read(path)) is not None:
                return _digest_in(source, parts[length:])
    return None


def _digest_in(source: str, qualified: list[str]) -> str | None:
    nodes = _parse(source)
    found: list[ast.stmt] = []
    for part in qualified:
        # A property has several definitions of the same name, and all count.
        found = _named(nodes, part)
        if not found:
            return None
        nodes = [statement for node in found for statement in getattr(node, "body", ())]
    return _digest_of(found)


@cache
def module_digest(source: str) -> str:
    """Return a hash of the code of a module, likewise."""
    return _digest_of([ast.parse(source)])


def _digest_of(nodes: Sequence[ast.stmt | ast.Module]) -> str:
    text = "\n".join(ast.unparse(_PlainFStrings().visit(_without_docstrings(node))) for node in nodes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _parse(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _named(nodes: list[ast.stmt], name: str) -> list[ast.stmt]:
    """Return the functions, classes and assignments of a name, those under `if` and `try` included."""
    inner = [child for node in nodes if isinstance(node, ast.If | ast.Try) for child in ast.iter_child_nodes(node)]
    nested = [node for node in inner if isinstance(node, ast.stmt)]
    found = [node for node in nodes if name in assigned(node) or (isinstance(node, Definition) and node.name == name)]
    return found + (_named(nested, name) if nested else [])


def assigned(node: ast.AST) -> set[str]:
    """Return the names that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _without_docstrings(tree: ast.stmt | ast.Module) -> ast.stmt | ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, Definition | ast.Module) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


class _PlainFStrings(ast.NodeTransformer):
    """Writes f-strings as calls of `f`: their quotes depend on the release of Python that unparses them."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Call:
        self.generic_visit(node)
        return ast.Call(ast.Name("f"), node.values, [])

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.Call:
        self.generic_visit(node)
        form = [] if node.format_spec is None else [node.format_spec]
        return ast.Call(ast.Name("value"), [node.value, ast.Constant(node.conversion), *form], [])
