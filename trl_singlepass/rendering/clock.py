"""Freeze the clock that chat templates read, so that all turns of a conversation see the same time."""

from datetime import datetime


# Directives of strftime: a template prints date and time through them, so they are what has to stand still. It may put
# a format together from parts, so all of them are frozen, not only those that it spells out.
_DIRECTIVES = [f"%{dash}{letter}" for letter in "aAbBcdDefFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ" for dash in ("-", "")]
# A macro of this name takes the place of transformers' function, which looks at the clock at every call. The newline
# after it is swallowed by `trim_blocks`, so the template itself begins at the start of a line.
_FROZEN_CLOCK = """{%- macro strftime_now(format) -%}
{%- set clock = namespace(text=format) -%}
{%- for directive, value in frozen_clock.items() -%}
{%- set clock.text = clock.text | replace(directive, value) -%}
{%- endfor -%}
{{- clock.text -}}
{%- endmacro %}
"""


def reads_clock(source: str) -> bool:
    """Whether a chat template prints the date or the time."""
    return "strftime_now" in source


def with_frozen_clock(source: str) -> str:
    """Return a chat template that reads the time from its variable `frozen_clock` (see [`freeze`])."""
    return _FROZEN_CLOCK + source if reads_clock(source) else source


def freeze(now: datetime) -> dict[str, str]:
    """Return the text of each strftime directive at a point in time: the value of `frozen_clock`."""
    return {directive: now.strftime(directive) for directive in _DIRECTIVES}
