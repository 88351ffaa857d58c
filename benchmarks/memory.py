"""Peak memory of a process: of the GPU where there is one, of the process itself otherwise."""

import resource
import sys
from pathlib import Path

import torch


STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> int:
    """Forget the peak so far; return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if STATUS.exists():
        CLEAR_REFS.write_text("5")
        return _status("VmRSS")
    return peak()


def peak() -> int:
    """Largest number of bytes in use since `reset_peak`; where the system cannot reset it, since the start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
