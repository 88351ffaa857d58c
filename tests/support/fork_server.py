"""
Fork workers from a process that has already imported everything, so that a distributed run starts at once.

Reads one JSON job per line from stdin: `world_size`, `port` of the store, `environment`, `settings` of the worker,
`timeout` in seconds, and `log` (a path). Writes one line per job to the file descriptor given as its argument: the
exit code of each rank, in order; negative for a signal.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback

# Imported here once, not in every fork. DeepSpeed's engines import PyTorch's compiler, which takes seconds.
import deepspeed  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
import worker


def run_rank(job, rank):
    """Become one rank; never returns."""
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.dump_traceback_later(0.8 * job["timeout"])  # shows where a rank hangs before it is killed
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world_size"], "LOCAL_WORLD_SIZE": job["world_size"]}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"], "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if job["world_size"] > 1:
        os.environ.update({name: str(value) for name, value in {**ranks, **store}.items()})
    os.environ.update(job.get("environment", {}))
    code = 1
    try:
        worker.main(job["settings"])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads sometimes abort an ordinary exit


def run(job):
    """Fork all ranks and return their exit codes; if one fails or times out, kill the others."""
    children = {}
    for rank in range(job["world_size"]):
        pid = os.fork()
        if pid == 0:
            run_rank(job, rank)
        children[pid] = rank
    codes, deadline = [None] * len(children), time.monotonic() + job["timeout"]
    while None in codes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children[pid]] = os.waitstatus_to_exitcode(status)
        failed = any(codes) or time.monotonic() > deadline
        for child, rank in children.items():
            if failed and codes[rank] is None:
                os.kill(child, signal.SIGKILL)
        time.sleep(0 if pid else 0.02)
    return codes


def main():
    """Serve jobs until the input ends."""
    gc.freeze()  # a collection would write to, and so copy, every page that the ranks share
    answers = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()
    os._exit(0)


main()
