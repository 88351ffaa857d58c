"""A process that a command that trains starts: its script, and its errors without a traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib import import_module
from types import FrameType

from ..scripts import SCRIPTS
from .arguments import EXPLAINED, INTERRUPTED, USER_ERRORS, describe_error


_HEAD_START = 10.0  # seconds in which rank 0 prints an error that all ranks have, and the launcher stops the others


class Interruption:
    """Ctrl-C in this process, which ends it without a traceback, and in the processes that prepare its data."""

    def __init__(self) -> None:
        self.happened = False
        self._process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Stop what runs, once: a launcher passes on what the terminal has sent already."""
        if os.getpid() != self._process:  # a fork
            os._exit(INTERRUPTED)
        if not self.happened:
            self.happened = True
            raise KeyboardInterrupt


def run() -> int:
    """Run the script of the command that is this process's first argument with the others; return its exit code."""
    command = sys.argv.pop(1)
    interruption = Interruption()
    signal.signal(signal.SIGINT, interruption.handle)
    try:
        # Imported only now: it takes seconds, in which Ctrl-C must work as well.
        script = import_module(SCRIPTS[command])
        script.main(*script.make_parser().parse_args_and_config(fail_with_unknown_args=False))
    except BaseException as error:
        if interruption.happened:  # collectives of which another rank was interrupted raise errors of their own
            return INTERRUPTED
        if not isinstance(error, USER_ERRORS):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            time.sleep(_HEAD_START)
        where = f" (rank {rank})" if rank > 0 else ""
        print(f"trl-singlepass {command}{where}: {describe_error(error, command)}", file=sys.stderr, flush=True)
        return EXPLAINED
    return 0


if __name__ == "__main__":
    raise SystemExit(run())
