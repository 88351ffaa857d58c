"""Describe where a measurement ran, and what it measured: machine, versions, commit, code."""

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.freshness import code_of


CPUINFO = Path("/proc/cpuinfo")


def describe(device: str, kind: str = "") -> dict[str, Any]:
    """Return where and when something is measured; for results of a kind, also which code."""
    return {
        **({"kind": kind, "code": code_of(kind)} if kind else {}),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "trl_singlepass")),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "device": _device(device)},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl")},
        },
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    if not CPUINFO.exists():
        return platform.processor()
    names = [
        line.partition(":")[2].strip() for line in CPUINFO.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu, one thread"


def anonymous_bytes() -> int:
    """Return the bytes of this process that are not backed by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def file_name_of_device(device: str) -> str:
    """`"NVIDIA H100 80GB HBM3"` -> `"nvidia_h100_80gb_hbm3"`."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower())
