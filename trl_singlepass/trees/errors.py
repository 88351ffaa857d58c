"""Errors about data, said to its user, and errors of other packages as sentences of ours; imports nothing."""


class DataError(ValueError):
    """Something in a dataset that cannot be trained."""


# Control characters but for tabs and line feeds, and what is shown in their place: a terminal would obey them.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | {0x7F: 0x2421}


def printable(text: str) -> str:
    """Return a text of the data as a terminal may show it: control characters as symbols, such as ␛."""
    return text.translate(_CONTROLS)


def first_line(error: BaseException, length: int = 300) -> str:
    """Return the first `length` characters of an error's text in one line, as a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = printable(text)
    return as_sentence(text if len(text) <= length else text[: length - 1] + "…")


def as_sentence(text: str) -> str:
    """Return a text with a full stop, unless it ends a sentence already."""
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."
