"""A process that `trl-singlepass train` starts: the training script, with errors that users can act on in one line."""

from __future__ import annotations

import os
import sys
import time

from ..scripts.sft import main, make_parser
from .errors import USER_ERRORS, describe_error


EXPLAINED = 2
"""Exit code of a process that has printed its error."""
_HEAD_START = 10.0  # seconds in which rank 0 prints an error that all ranks have, and the launcher stops the others


def run() -> int:
    """Run the training script with the arguments of this process, and return its exit code."""
    try:
        main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
    except USER_ERRORS as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            time.sleep(_HEAD_START)
        where = f" (rank {rank})" if rank > 0 else ""
        print(f"trl-singlepass train{where}: {describe_error(error)}", file=sys.stderr, flush=True)
        return EXPLAINED
    return 0


if __name__ == "__main__":
    raise SystemExit(run())
