"""Run a worker script of this folder on two processes under `torchrun`."""

import os
import subprocess
import sys
from pathlib import Path


WORKERS = Path(__file__).parent


def run_on_two_processes(worker, output, timeout=240):
    """
    Run a worker, which writes its results to `output`.

    Args:
        worker (`str`):
            Name of a script beside this file, without its ending.
        output (`Path`):
            File or folder that the script takes as its argument.
        timeout (`float`, *optional*, defaults to 240):
            In seconds.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, WORKERS / f"{worker}.py", output]
    path = os.pathsep.join(map(str, [WORKERS.parent, WORKERS.parents[1]]))  # for `support` and for the package
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
