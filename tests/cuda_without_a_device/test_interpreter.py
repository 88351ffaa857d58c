"""TRL's kernels of the fused head, run by Triton's interpreter on the CPU, equal PyTorch's formulas."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from packaging.version import Version


TESTS = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,  # with the lowering, since it needs Triton as well
    pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="the kernels came with TRL 1.16"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton: `make test-slow` installs it"
    ),
]


@pytest.fixture(scope="module")
def result():
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "support.interpreter_worker"],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_kernels_ran(result):
    assert result["launched"] == ["_backward_kernel", "_forward_kernel"]


@pytest.mark.parametrize("case", ["plain", "bias", "softcap", "scale and temperature"])
def test_fused_head(case, result):
    differences = result["differences"][case]
    assert len(differences) == (5 if case in ("bias", "scale and temperature") else 4)
    assert max(differences) < 1e-5, differences
