"""Tables of the docs that tests write, each between two marks of its page, and what a survey finds."""

import re
from dataclasses import dataclass


# The size of an error is not the same on every machine.
_NUMBERS = r" (?:by )?[(\d][^;]*(?=;|$)"


_ROW = r"^\| ([^|`]+?) \| (.*?) \|(?: ([^|`]*?) \|)? (`[^|]+`) \|$"
STATUSES = ["exact", "refused", "cannot be built here"]


@dataclass(frozen=True)
class Outcome:
    """What a survey found of a model or adapter."""

    name: str
    status: str
    remark: str = ""
    images: str | None = None


def grouped(outcomes):
    """Return a line for all names of the same outcome; those of most names come first."""
    groups = {}
    for one in outcomes:
        cells = (one.status, one.remark, *([] if one.images is None else [one.images]))
        groups.setdefault(cells, []).append(f"`{one.name}`")
    order = sorted(groups, key=lambda cells: (STATUSES.index(cells[0]), -len(groups[cells])))
    return [f"| {' | '.join((*cells, ', '.join(groups[cells])))} |" for cells in order]


def read_grouped(page, name):
    """Return the outcomes of a table by their name."""
    rows = re.findall(_ROW, read_part(page, name), re.M)
    return {
        one: Outcome(one, status, remark, images or None)
        for status, remark, images, names in rows
        for one in re.findall("`(.+?)`", names)
    }


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
