"""Errors of other packages as a sentence of ours; imports nothing, since the command line needs it at once."""

from __future__ import annotations


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the first `length` characters of an error's text in one line, as a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return as_sentence(text if len(text) <= length else text[: length - 1] + "…")


def as_sentence(text: str) -> str:
    """Return a text with a full stop, unless it ends a sentence already."""
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."
