"""What every page has: one file, no network, its text escaped."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from typing import Any


def frame(title: str, body: str, *, script: str | None = None, data: Any = None) -> str:
    """
    Return a page in one piece.

    Args:
        title (`str`):
            Plain text.
        body (`str`):
            HTML, in which text of the data is escaped.
        script (`str`, *optional*):
            Name of a JavaScript file of this folder. It finds `data` under `JSON.parse` of the element `data`.
        data (`Any`, *optional*):
            What the script shows.

    Returns:
        `str`: HTML that needs no other file. Its content policy forbids it to load any.
    """
    scripts = ""
    if script is not None:
        scripts = (
            f'<script type="application/json" id="data">{json_in_html(data)}</script>\n'
            f"<script>\n{_file(script)}</script>\n"
        )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{_file('page.css')}</style>\n</head>\n"
        f"<body>\n{body}\n{scripts}</body>\n</html>\n"
    )


def json_in_html(data: Any) -> str:
    """Return JSON that can stand inside a script element: no text of the data can end it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
