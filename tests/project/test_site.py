"""The site builds without a broken link or anchor, and has every public name and page."""

import re
from html import unescape
from pathlib import Path

import pytest

import trl_singlepass
from support.trainers import own_settings
from trl_singlepass import SinglePassDPOConfig, SinglePassSFTConfig


ROOT = Path(__file__).parents[2]
mkdocs = pytest.importorskip("mkdocs.commands.build")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        mkdocs.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def get_text(page):
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


# Libraries of the site builder use deprecated names of each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")


def test_the_reference_has_every_public_name_and_setting(site):
    text = get_text(site / "reference" / "index.html")
    for name in (*trl_singlepass.__all__, *own_settings(SinglePassSFTConfig), *own_settings(SinglePassDPOConfig)):
        assert re.search(rf"\b{name}\b", text), name
