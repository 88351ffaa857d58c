"""Peak memory: of the GPU if PyTorch has one, of the process otherwise."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> int:
    """Forget the peak so far, and return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if _STATUS.exists():
        _CLEAR_REFS.write_text("5")
        return _status("VmRSS")
    return peak()


def peak() -> int:
    """Return the largest number of bytes in use since `reset_peak`; since the start where no system call resets it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
