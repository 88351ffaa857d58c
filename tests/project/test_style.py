"""Rules that no linter checks: what is documented of the public names, and what imports torch."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trl_singlepass
from support.trainers import own_settings
from trl_singlepass import SinglePassDPOConfig, SinglePassSFTConfig
from trl_singlepass.training.config import EngineConfig, SinglePassConfig


ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = ["trees.prefix_tree", "trees.rows", "trees.sharing", "rendering.samples", "cost", "reports.tree_plots"]


def test_data_modules_do_not_import_torch():
    modules = ", ".join(f"trl_singlepass.{module}" for module in WITHOUT_TORCH)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def documented(value):
    """Return the names in the `Args:` section of a Hugging Face docstring, or `None` if it has none."""
    section = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", inspect.getdoc(value) or "", re.S | re.M)
    return section and re.findall(r"^ {4}\*{0,2}(\w+) \(", section.group(1), re.M)


CONFIGS = [SinglePassSFTConfig, SinglePassDPOConfig]
CALLABLES = [
    name for name in trl_singlepass.__all__ if callable(getattr(trl_singlepass, name)) and not name.endswith("Config")
]


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_list_the_arguments_of_the_signature(name):
    value = getattr(trl_singlepass, name)
    names = documented(value)
    if names is None:  # a one-line docstring may leave its arguments to the types
        return
    assert names == [argument for argument in inspect.signature(value).parameters if argument != "self"]


@pytest.mark.parametrize("config", CONFIGS)
def test_each_setting_is_documented_once(config):
    shared = {*documented(EngineConfig), *documented(SinglePassConfig)}
    assert sorted(shared | set(documented(config))) == sorted(own_settings(config))
    assert not shared & set(documented(config))
