"""Reports for people: the inspection of a conversation, the audit of a dataset, plots, and HTML pages."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: "1 turn", "1,000 turns"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
