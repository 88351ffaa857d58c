"""Runs a command in a process of its own: what one does to the GPU or to memory spoils no other."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and why it failed if it did."""

    output: str
    failed: str | None


def run_apart(command: Sequence[str], seconds: float) -> Outcome:
    """Run a command to its end, or for so many seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return Outcome(output, f"took longer than {seconds:.0f} seconds")
    if done.returncode == 0:
        return Outcome(done.stdout, None)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # A signal leaves no message; an exception is the last line.
    message = lines[-1] if lines and done.returncode > 0 else "no message"
    return Outcome(done.stdout, f"exit code {done.returncode}: {message[:500]}")
