"""Self-contained HTML pages of an inspection and of an audit, and the frame that both stand in."""

from __future__ import annotations

import json
from html import escape
from importlib import resources


def frame(title: str, body: str, *, script: str | None = None, data: object = None) -> str:
    """
    Return a complete page that needs no other file. Its content security policy forbids loading any.

    `body` is HTML, in which text from the data must be escaped already. `script` names a JavaScript file in this
    folder, which reads `data` (anything that `json.dumps` takes) from the element with the id `data`.
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
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{_file('page.css')}</style>\n</head>\n"
        f"<body>\n{body}\n{scripts}</body>\n</html>\n"
    )


def json_in_html(data: object) -> str:
    """Return JSON to embed in a script element: no text in the data can close the element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
