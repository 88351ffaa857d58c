"""Fixtures of the distributed tests: runs of the worker on several processes, and the same training on one."""

import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from support.worker_settings import (
    TOLERANCE,
    assert_engine,
    assert_same_training,
    on_engine,
    read_result,
    with_config,
)


HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Mark every test in this folder as `distributed`."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)


class WorkerPool:
    """Runs the worker in any number of processes, forked from one that has already imported everything."""

    def __init__(self):
        read_end, write_end = os.pipe()  # not stdout, which libraries print to
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE.parent / "support" / "fork_server.py", str(write_end)],
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
        """Run the worker; return its result with the exit codes and the output of the ranks."""
        settings = {"result": str(folder / "result"), **settings}
        # The store picks a free port and holds it until the ranks have ended: no race for it.
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

    def assert_refused(self, folder, settings, named, environment=None):
        """Assert that two ranks stop with an error that names something."""
        run = self.run(folder, settings, world_size=2, environment=environment, expect_success=False)
        assert run.codes != [0, 0]
        errors = [line for line in run.log.splitlines() if re.match(r"[\w.]*Error: ", line)]
        assert any(named in line for line in errors), run.log[-6000:]

    def close(self):
        """Stop the fork server."""
        self.process.stdin.close()
        self.answers.close()
        self.process.wait(timeout=20)


@pytest.fixture(scope="session")
def workers():
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def one_process(workers, tmp_path_factory):
    """Return a function that trains in one process, once for each combination of settings."""
    results = {}

    def train(settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in results:
            results[key] = workers.run(tmp_path_factory.mktemp("one_process"), settings)
        return results[key]

    return train


@pytest.fixture
def assert_as_alone(workers, one_process, tmp_path):
    """
    Return a function that asserts that two ranks train on an engine what one process trains, and returns the run.

    `own` are settings of the ranks alone, `alone` those of the process, whose run is an attribute of the result.
    """

    def check(engine, settings, tolerance=TOLERANCE, own=None, rel=None, eval_rel=1e-6, **alone):
        expected = one_process(with_config(settings, **{"per_device_train_batch_size": 2, **alone}))
        settings, environment = on_engine(engine, settings)
        run = workers.run(tmp_path, with_config(settings, **(own or {})), world_size=2, environment=environment)
        assert_engine(run, engine)
        assert len(run.loss) == len(expected.loss) > 0
        assert_same_training(run, expected, tolerance, rel)
        assert run.num_trained_tokens == expected.num_trained_tokens
        assert run.num_tokens == expected.num_tokens
        if settings.get("evaluate"):
            assert run.evaluation["eval_loss"] == pytest.approx(expected.evaluation["eval_loss"], rel=eval_rel)
        run.alone = expected
        return run

    return check
