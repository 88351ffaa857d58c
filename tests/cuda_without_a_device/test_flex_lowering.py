"""Inductor lowers tree attention by FlexAttention to Triton kernels for an H100, on a machine without one."""

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
SHORT, ALIGNED, LONG = (2, (8, 25, 10)), (2, (24, 100, 1)), (4, (20, 100, 38))
LENGTHS = {SHORT: 101, ALIGNED: 256, LONG: 751}
# Turns and sizes; kind and size of the rule; query heads, key-value heads, their size; softcap; sinks.
CASES = [
    (*SHORT, "causal", 0, 8, 8, 128, None, False),
    (*SHORT, "causal", 0, 16, 8, 128, None, False),
    (*SHORT, "window", 32, 32, 8, 64, None, True),
    (*SHORT, "causal", 0, 28, 4, 128, None, False),
    (*SHORT, "window", 32, 8, 4, 256, 50.0, False),
    (*ALIGNED, "causal", 0, 16, 8, 128, None, False),
    (*ALIGNED, "chunk", 64, 40, 8, 128, None, False),
    (*LONG, "causal", 0, 28, 4, 128, None, False),
    (*LONG, "window", 512, 16, 8, 128, None, False),
    (*LONG, "window", 128, 64, 8, 64, None, True),
    (*LONG, "chunk", 1024, 40, 8, 128, None, False),
    (*LONG, "causal", 0, 8, 4, 256, 50.0, False),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which runs on any Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A CUDA device that does nothing, as a shared object."""
    torch_folder, out = Path(torch.__file__).parent, tmp_path_factory.mktemp("guard") / "guard.so"
    includes = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    links = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = TESTS / "support/cuda_guard.cpp"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-std=c++20", *includes, source, "-o", out, *links], check=True)
    return out


@pytest.fixture(scope="module", params=["forward", "backward"])
def lowered(request, guard, tmp_path_factory):
    """Direction, and what became of each case."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run(
        [sys.executable, "-m", "support.flex_lowering_worker", guard, request.param, json.dumps(CASES)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-len(CASES) :]
    return request.param, dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_tree_attention_lowers_to_the_main_kernels(case, lowered):
    direction, results = lowered
    result = results[case]
    assert result["length"] == LENGTHS[case[:2]]
    name = "flex_attention_backward" if direction == "backward" else "flex_attention"
    assert any(name in kernel and "tem_" in kernel for kernel in result.get("kernels", ())), result
