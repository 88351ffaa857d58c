"""
Fork workers from one process that has imported everything: a distributed run then starts in no time.

Reads one job per line: `world_size`, `port` of the store, `environment`, `settings` of the worker, `timeout` in
seconds, `log` (a path). Answers with one line per job, on the file descriptor that its argument names: the exit code
of each rank, in order; negative for a signal.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback

import deepspeed  # noqa: F401 - so that no fork has to import it
import worker


def run_rank(job, rank):
    """Become one rank; never returns."""
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.dump_traceback_later(0.8 * job["timeout"])  # where it hangs, before it is killed
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
    os._exit(code)  # gloo's threads may abort a process that ends the ordinary way


def run(job):
    """Fork all ranks and return their exit codes; the others are killed when one fails or time is up."""
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
    gc.freeze()  # a collection would write to every page that the ranks share
    answers = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()
    os._exit(0)


main()
