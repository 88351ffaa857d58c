"""Tables of the docs that tests write, each between two marks of its page, and a row of a survey."""

import re
from dataclasses import dataclass


# The size of an error is not the same on every machine.
_NUMBERS = r" (?:by )?[(\d][^;]*(?=;|$)"


@dataclass(frozen=True)
class Outcome:
    """What a survey found of a model or adapter: a row of its table."""

    name: str
    status: str
    remark: str = ""
    images: str | None = None

    def __str__(self):
        cells = [f"`{self.name}`", self.status, self.remark, *([] if self.images is None else [self.images])]
        return f"| {' | '.join(cells)} |"


def refused_by_check(report):
    """Return the remark for a model that the measured check refuses."""
    return f"measured: {re.sub(_NUMBERS, '', report.reason)}"


def counts(found, words):
    """Return how many begin with each of these words, as text."""
    return ", ".join(f"{sum(each.startswith(word) for each in found)} {word}" for word in words)


def read_part(page, name):
    """Return what stands between the marks of this name."""
    return _pattern(name).search(page.read_text(encoding="utf-8")).group(1)


def write_part(page, name, text):
    """Replace what stands between the marks of this name."""
    before = page.read_text(encoding="utf-8")
    part = f"{_mark(name, 'begin')}\n{text}{_mark(name, 'end')}"
    page.write_text(_pattern(name).sub(lambda _: part, before), encoding="utf-8")


def _pattern(name):
    return re.compile(f"{_mark(name, 'begin')}\n(.*?){_mark(name, 'end')}", re.S)


def _mark(name, side):
    return f"<!-- {name}: {side} -->"
