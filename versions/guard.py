"""
Report, by name, what other libraries changed of the code that this project relies on.

    python -m versions.guard                          compare the installed releases with those that passed the tests
    python -m versions.guard --record                 after the tests have passed with them: write their hashes down
    python -m versions.guard --record trl==1.14.0     the same of releases that are not installed
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from packaging.version import Version

from .relied_on import ASSUMED, BASES, PRIVATE
from .sources import Reader, digest, in_wheel, installed


ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "digests.json"
TRAINERS = {
    "SinglePassSFTTrainer": ("training/mixin.py", "training/epochs.py", "training/trainer.py"),
    "SinglePassDPOTrainer": ("training/mixin.py", "preference/trainer.py"),
}
PACKAGES = ("accelerate", "deepspeed", "transformers", "trl")

Digests = dict[str, str | None]


def overridden() -> list[str]:
    """Return the names of the methods above the trainers that those override, in every class that may define them."""
    names = []
    for trainer, files in TRAINERS.items():
        trees = (ast.parse((ROOT / "trl_singlepass" / file).read_text()) for file in files)
        classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
        methods = dict.fromkeys(node.name for cls in classes for node in cls.body if isinstance(node, ast.FunctionDef))
        names += [f"{base}.{method}" for base in BASES[trainer] for method in methods]
    return names


@cache
def imported() -> tuple[str, ...]:
    """Return the names of the functions of other libraries that this project imports, where they are defined."""
    return tuple(_imported())


def _imported() -> Iterator[str]:
    for path in sorted((ROOT / "trl_singlepass").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level or str(node.module).split(".")[0] not in PACKAGES:
                continue
            module = importlib.import_module(str(node.module))
            functions = (getattr(module, alias.name, None) for alias in node.names)
            yield from (f"{item.__module__}.{item.__qualname__}" for item in functions if inspect.isfunction(item))


def digests_of(package: str, read: Reader) -> Digests:
    """Return the digest of all code of a package that this project relies on."""
    listed = dict.fromkeys([*imported(), *PRIVATE.values(), *ASSUMED])
    own = {name: digest(name, read) for name in listed if name.split(".")[0] == package}
    of_bases = {name: digest(name, read) for name in overridden() if name.split(".")[0] == package}
    return own | {name: value for name, value in of_bases.items() if value is not None}


def changes(package: str, version: str, now: Digests, record: dict[str, dict[str, Digests]]) -> list[str]:
    """Return one line for each name whose code is not that of the nearest recorded release."""
    known = record.get(package, {})
    if not known:
        return [f"{package} {version}: no release is recorded"]
    at_most = [name for name in known if Version(name) <= Version(version)] or list(known)
    nearest = max(at_most, key=Version)
    before = known[nearest]
    return [
        f"{name} {_verb(before.get(name), now.get(name))} ({package} {nearest} → {version})"
        for name in sorted(before.keys() | now.keys() if nearest != version else before.keys() & now.keys())
        if before.get(name) != now.get(name)
    ]


def _verb(before: str | None, now: str | None) -> str:
    return "is gone" if now is None else "is new" if before is None else "changed"


def read_record() -> dict[str, dict[str, Digests]]:
    """Return the digests of all recorded releases: package, version, name."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel or source archive of a release, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", requirement]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    (path,) = folder.iterdir()
    return path


def main() -> int:
    """Compare or record; return the number of changes, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write hashes down instead of comparing them")
    parser.add_argument("releases", nargs="*", help="such as trl==1.14.0; the installed ones if none is named")
    arguments = parser.parse_args()
    record, found = read_record(), []
    with tempfile.TemporaryDirectory() as folder:
        for item in arguments.releases or PACKAGES:
            package = item.partition("==")[0]
            target = Path(folder, item)
            target.mkdir()
            version, read = in_wheel(download(item, target)) if "==" in item else installed(package)
            now = digests_of(package, read)
            if arguments.record:
                record.setdefault(package, {})[version] = now
            else:
                found += changes(package, version, now, record)
    if arguments.record:
        ordered = {name: dict(sorted(known.items(), key=lambda x: Version(x[0]))) for name, known in record.items()}
        RECORD.write_text(json.dumps(ordered, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    print("\n".join(found) if found else "Nothing that this project relies on has changed.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
