"""What the distributed tests share: runs of the worker, and what one process trains."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from support.runs import read_result


HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Mark every test of this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)


class Nursery:
    """Runs the worker in any number of processes, forked from one that has imported everything."""

    def __init__(self):
        read_end, write_end = os.pipe()  # not stdout, on which libraries print
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE.parent / "support" / "nursery.py", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=(write_end,),
        )
        os.close(write_end)
        self.answers = os.fdopen(read_end)

    def run(self, folder, settings, world_size=1, environment=None, expect_success=True, timeout=300):
        """Run the worker and return its result, with the exit codes of the ranks and what they printed."""
        settings = {"result": str(folder / "result"), **settings}
        # The store outlives the ranks and takes a port that is free: no race for one.
        store = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
        job = {
            "world_size": world_size,
            "port": store.port,
            "environment": environment or {},
            "settings": settings,
            "timeout": timeout,
            "log": str(folder / "log"),
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        codes = json.loads(self.answers.readline())
        del store
        log = "".join(path.read_text() for path in sorted(folder.glob("log.*")))
        if expect_success:
            assert codes == [0] * world_size, log[-6000:]
        result = read_result(folder / "result")
        result.codes, result.log = codes, log
        return result

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.answers.close()
        self.process.wait(timeout=20)


@pytest.fixture(scope="session")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def one_process(nursery, tmp_path_factory):
    """Return what one process trains with some settings; the same settings are run once."""
    results = {}

    def train(settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in results:
            results[key] = nursery.run(tmp_path_factory.mktemp("one_process"), settings)
        return results[key]

    return train
