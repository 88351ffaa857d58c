"""Workers that compile for GPUs on a machine without one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """A CUDA device that does nothing, as a shared object."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which runs on any Linux: `make test-slow` installs it")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    torch_folder, out = Path(torch.__file__).parent, tmp_path_factory.mktemp("guard") / "guard.so"
    includes = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    links = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = TESTS / "support/cuda_guard.cpp"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-std=c++20", *includes, source, "-o", out, *links], check=True)
    return out


@pytest.fixture(scope="session")
def lower(guard, tmp_path_factory):
    """A function that starts lowering cases for a card, and returns a function that waits for the outcome of each."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])

    def start(card, direction, cases, *, compiled=False):
        cache = tmp_path_factory.mktemp("cache")
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
        command = [sys.executable, "-m", "support.flex_lowering_worker", guard, card, direction, json.dumps(cases)]
        with (cache / "stderr").open("w") as log:
            process = subprocess.Popen(
                [*command, *([cache] if compiled else [])],
                env={**os.environ, "PYTHONPATH": path, **caches},
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

        def outcomes():
            out, _ = process.communicate()
            assert process.returncode == 0, (cache / "stderr").read_text()[-5000:]
            return dict(zip(cases, map(json.loads, out.splitlines()[-len(cases) :]), strict=True))

        return outcomes

    return start
