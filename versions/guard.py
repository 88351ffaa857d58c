"""
Report, by name, what other libraries changed of the code that this project relies on.

    python -m versions.guard                          compare the installed releases with those that passed the tests
    python -m versions.guard --record                 after the tests have passed with them: write their hashes down
    python -m versions.guard --record trl==1.14.0     the same of releases that are not installed
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.version import Version

from .relied_on import PACKAGES, relied_on
from .sources import Files, digest, in_wheel, installed


RECORD = Path(__file__).parent / "results" / "digests.json"
Digests = dict[str, str]


def digests_of(package: str, read: Files) -> Digests:
    """Return the digest of all code of a package that this project relies on."""
    found = {name: digest(name, read) for name in relied_on(package, read)}
    return {name: value for name, value in found.items() if value is not None}


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
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
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
