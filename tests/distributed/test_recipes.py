"""Every recipe is read by the tool that it is for, and every launch line of the docs names recipes that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig


ROOT = Path(__file__).parents[2]
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "recipes" / "deepspeed").glob("*.json"))
KINDS = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS.get(path.stem, "DEEPSPEED")
    if config.distributed_type == "DEEPSPEED":
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]) in DEEPSPEED


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_reads(path):
    config = json.loads(path.read_text())
    stage = int(re.match(r"zero(\d)", path.stem).group(1))
    read = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert read.stage == stage
    assert (read.offload_param is not None) == path.stem.endswith("offload")


def test_all_engines_have_a_recipe():
    engines = ["ddp", "fsdp2", "single", "ulysses", "zero1", "zero2", "zero3", "zero3-offload"]
    assert {path.stem for path in ACCELERATE} == set(engines)
    assert {path.stem for path in DEEPSPEED} == {name for name in engines if name.startswith("zero")}


def test_bash_reads_the_slurm_script():
    subprocess.run(["bash", "-n", ROOT / "recipes" / "slurm" / "train.sh"], check=True)


def test_the_docs_name_recipes_that_exist():
    named = set(re.findall(r"recipes/[\w/.-]+\w", (ROOT / "docs" / "distributed.md").read_text()))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
