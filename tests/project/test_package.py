"""The wheel holds what its commands need, and the version is the same wherever it stands."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
import yaml

import trl_singlepass


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Repository"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def test_the_wheel_holds_every_tracked_file_of_the_package_and_every_recipe(wheel):
    names = {name for name in wheel.namelist() if not name.startswith("trl_singlepass-")}
    tracked = subprocess.run(
        ["git", "ls-files", "trl_singlepass", "recipes"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode != 0:
        pytest.skip("not a git repository")
    expected = {re.sub(r"^recipes/", "trl_singlepass/cli/recipes/", name) for name in tracked.stdout.split()}
    assert expected <= names


def test_the_page_on_the_index_has_no_relative_links(wheel):
    (metadata,) = (wheel.read(name) for name in wheel.namelist() if name.endswith("/METADATA"))
    page = BytesParser().parsebytes(metadata).get_payload(decode=True).decode()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 20
    assert [link for link in links if not link.startswith("https://")] == []
    own = [link for link in links if "/trl-singlepass/v" in link or f"{REPOSITORY}/blob/v" in link]
    for link in own:
        path = re.split(rf"/v{re.escape(trl_singlepass.__version__)}/", link)[1]
        assert (ROOT / path.partition("#")[0]).exists(), link


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == trl_singlepass.__version__
    released = re.findall(r"^## (\d\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == trl_singlepass.__version__


def test_python_versions_are_those_that_are_tested():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    classifiers = PROJECT["project"]["classifiers"]
    assert [text.split()[-1] for text in classifiers if re.search(r"Python :: 3\.", text)] == tested
