"""Errors about data, said to its user, and errors of other packages as sentences of ours; imports nothing."""


class DataError(ValueError):
    """Something in a dataset that cannot be trained."""


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the first `length` characters of an error's text in one line, as a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return as_sentence(text if len(text) <= length else text[: length - 1] + "…")


def as_sentence(text: str) -> str:
    """Return a text with a full stop, unless it ends a sentence already."""
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."
