"""Lines of a log that cannot be trained as they were sent: all named in one error, or left out and counted."""

from __future__ import annotations

from dataclasses import dataclass

from ..bad_rows import mask_details


_LINES_NAMED = 10


class LogError(ValueError):
    """Why a line of a log cannot be trained as it was sent."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a log."""

    path: str  # file, as the user named it
    line: int  # from 1; in a file that is one JSON object, the number of the step in it

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class BadLines:
    """Bad lines of a log, in the order in which they were found."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[Place, str], None] = {}

    def __len__(self) -> int:
        return len({place for place, _ in self._reasons})

    def add(self, place: Place, reason: str) -> None:
        """Note why a line cannot be trained as it was sent."""
        self._reasons[place, reason] = None

    def group(self) -> list[str]:
        """Return a sentence for each reason with the lines that it holds for, the most frequent first."""
        groups: dict[str, list[tuple[Place, str]]] = {}
        for place, reason in self._reasons:
            groups.setdefault(mask_details(reason), []).append((place, reason))
        return [_describe(group) for group in sorted(groups.values(), key=len, reverse=True)]

    def error(self) -> LogError:
        """Return the error that names all bad lines."""
        count, they = ("1 line", "it was") if len(self) == 1 else (f"{len(self)} lines", "they were")
        reasons = "".join(f"\n- {reason}" for reason in self.group())
        return LogError(
            f"{count} of the log cannot be trained as {they} sent; --bad_lines drop leaves out such lines and counts "
            f"them:{reasons}"
        )


def _describe(group: list[tuple[Place, str]]) -> str:
    (first, reason), count = group[0], len(group)
    if count == 1:
        return f"{first}: {reason}"
    named: dict[str, list[int]] = {}
    for place, _ in group[:_LINES_NAMED]:
        named.setdefault(place.path, []).append(place.line)
    places = ", ".join(f"{path}:{', '.join(map(str, lines))}" for path, lines in named.items())
    more = f" and {count - _LINES_NAMED} more" if count > _LINES_NAMED else ""
    return f"{count} lines ({places}{more}), the first: {reason}"
