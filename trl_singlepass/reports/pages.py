"""Self-contained HTML pages of an inspection and of an audit."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from io import BytesIO

import numpy as np
from rich.table import Table
from rich.text import Text

from ..images.loading import EncodedImage
from ..trees.image_features import ImageReference, image_of_feature
from ..trees.prefix_tree import PrefixTree
from .audit import AuditReport
from .audit.turns import Lengths
from .inspection import Inspection, TokenRole, consecutive


_THUMBNAIL = 160  # pixels of a side, at most
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 236, 46, 26, 42
_CHARACTER = 8.5  # pixels: in a narrow window, where a chart shrinks, its labels are larger


def frame(title: str, body: str, *, script: str | None = None, data: object = None) -> str:
    """
    Return a complete page around `body` (HTML); its content security policy forbids loading any other file.

    `script` names a JavaScript file beside this one, which reads `data` as JSON from the element with the id `data`.
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


# A conversation: tree, attention mask, tokens by role and weight, and the text of each turn --------------------------


def inspection_page(inspection: Inspection, title: str) -> str:
    """Return a self-contained page that shows one conversation, as HTML."""
    legend = "".join(f'<li><span class="token {role}">{role}</span></li>' for role in TokenRole)
    legend += '<li><span class="token trained">trained</span></li>'
    colours = "Orange is trained"
    if inspection.num_chosen is not None:
        legend += "".join(f'<li><span class="side {side}">{side}</span></li>' for side in ("chosen", "rejected"))
        colours = "Green is trained in the chosen trajectory, red in the rejected one, orange in both"
    body = f"""<header>
<h1>{escape(title)}</h1>
<p>{inspection.summary}</p>
<ul class="legend" aria-label="Colours">{legend}</ul>
</header>
<nav aria-label="Turns" id="turns"></nav>
<main>
<div>
<section aria-labelledby="tree-title" class="tree"><h2 id="tree-title">Tree</h2>
<p class="hint">Depth runs from left to right. History is on top, branches have their own lanes. {colours}; a turn's
number stands where the turn ends.</p>
<div id="tree"></div></section>
<section aria-labelledby="tokens-title" class="tokens text"><h2 id="tokens-title">Tokens</h2>
<p class="hint">Hover over or tap a token, or click here and use the arrow keys. Each block is a lane of the tree.</p>
<div id="tokens" tabindex="0" role="group" aria-label="Tokens"></div></section>
</div>
<div>
<section aria-labelledby="mask-title" class="mask"><h2 id="mask-title">Attention mask</h2>
<p class="hint">Each row is a token, each column a token that it may attend to.</p>
<canvas id="mask" role="img" aria-label="Attention mask"></canvas></section>
<section aria-labelledby="token-title" class="token-panel"><h2 id="token-title">Token</h2>
<dl id="token" aria-live="polite"></dl></section>
</div>
</main>
<dialog id="sample" aria-labelledby="sample-title"><h2 id="sample-title"></h2>
<p class="hint">The sequence that N-pass trains for this turn. Arrow keys switch turns; Escape closes.</p>
<div id="sample-text" class="text" tabindex="0"></div>
<form method="dialog"><button>Close</button></form></dialog>
<noscript>This page needs JavaScript. It loads nothing from elsewhere.</noscript>"""
    return frame(title, body, script="inspection.js", data=_data(inspection))


def _data(inspection: Inspection) -> dict[str, object]:
    tree = inspection.tree
    turns = [
        {
            "message": sample.message_index,
            "side": inspection.side(turn),
            "prompt": sample.prompt_length,
            "reasoning": sample.reasoning_length,
            "path": [[int(part[0]), int(part[-1]) + 1] for part in consecutive(path)],
        }
        for turn, (sample, path) in enumerate(zip(inspection.samples, inspection.paths, strict=True), start=1)
    ]
    lanes = [
        {"start": run.start, "end": run.end, "depth": run.depth, "fork": run.prefix[-1][1] - 1 if run.prefix else -1}
        for run in inspection.plan.runs
    ]
    roles = list(TokenRole)
    return {
        "text": list(inspection.texts),
        "role": [roles.index(role) for role in inspection.roles],
        "roles": roles,
        "weight": inspection.tree.token_weights.tolist(),
        "target": list(inspection.targets),
        "depth": tree.position_ids.tolist(),
        "end": tree.subtree_end.tolist(),
        "multiplicity": tree.multiplicity.tolist(),
        "turns": turns,
        "lanes": lanes,
        **_images(tree),
    }


def _images(tree: PrefixTree) -> dict[str, object]:
    """What the script shows of images: a thumbnail of each, and for each token the number of its image, or -1."""
    if tree.image_features is None:
        return {}
    owners = np.append(image_of_feature(tree.images), -1)  # text has the feature -1, the last entry
    sizes = [image.num_features for image in tree.images]
    return {
        "images": [_thumbnail(image) for image in tree.images],
        "sizes": sizes,
        "image": owners[tree.image_features].tolist(),
    }


def _thumbnail(image: ImageReference) -> str:
    """Return a small copy of an image, whose reference must hold it, as a data URL."""
    loaded = EncodedImage(image.source.get("path"), image.source.get("bytes")).load().convert("RGB")
    loaded.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = BytesIO()
    loaded.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# An audit: findings, plots and tables --------------------------------------------------------------------------------


def audit_page(report: AuditReport, title: str) -> str:
    """Return a self-contained page with an audit, as HTML."""
    findings = "".join(f"<li>{escape(finding)}</li>" for finding in report.findings)
    verdict = f'<p class="verdict">{escape(report.verdict)}</p>' if report.verdict else ""
    body = f"""<header><h1>{escape(title)}</h1><p>{escape(report.headline)}</p>{verdict}</header>
<div class="page">
<section><h2>Findings</h2><ul>{findings}</ul></section>
<div class="plots">{"".join(_plots(report))}</div>
{"".join(_section(table) for table in report.tables)}
</div>"""
    return frame(title, body)


def _section(table: Table) -> str:
    """The terminal's table as HTML."""
    head = "".join(f"<th>{_text(column.header)}</th>" for column in table.columns)
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    lines = []
    for cells, row in zip(rows, table.rows, strict=True):
        kind = ' class="total"' if row.style == "bold" else ""
        classes = [' class="left"' if isinstance(cell, Text) else "" for cell in cells]
        columns = "".join(f"<td{own}>{_text(cell)}</td>" for own, cell in zip(classes, cells, strict=True))
        lines.append(f"<tr{kind}>{columns}</tr>")
    caption = f'<p class="hint">{_text(table.caption)}</p>' if table.caption else ""
    return (
        f'<section><h2>{_text(table.title)}</h2>{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></section>\n"
    )


def _text(cell: object) -> str:
    return escape(cell.plain if isinstance(cell, Text) else str(cell)).replace("\n", " ")


def _plots(report: AuditReport) -> Iterable[str]:
    if report.sample_lengths is not None:
        yield _plot("Tokens per sample", "tokens", "samples", *_histogram(report.sample_lengths))
    if report.tree_lengths is not None:
        yield _plot("Tokens per tree", "tokens", "trees", *_histogram(report.tree_lengths))
    sharing = report.sharing_by_turns
    names, factors = [str(entry.num_turns) for entry in sharing], [entry.sharing_factor for entry in sharing]
    yield _plot("Sharing factor by number of turns", "turns", "sharing factor", factors, names, decimals=1)
    lost = [
        (recipe.name, 100 * recipe.reasoning_not_trained / recipe.reasoning_tokens)
        for recipe in report.recipes
        if recipe.conversations and recipe.reasoning_tokens
    ]
    shares, recipes = [share for _, share in lost], [name for name, _ in lost]
    yield _plot("Reasoning that other recipes leave untrained", "recipe", "% of reasoning tokens", shares, recipes)


def _histogram(lengths: Lengths) -> tuple[Sequence[float], Sequence[str]]:
    return lengths.counts, [f"{edge:,}" for edge in lengths.edges[:-1]]


def _plot(
    title: str, x_label: str, y_label: str, values: Sequence[float], names: Sequence[str], decimals: int = 0
) -> str:
    """A bar chart, unless there is only one bar. Bars are labelled at regular intervals, as often as labels fit."""
    if len(values) < 2:
        return ""
    top, step = max(*values, 0), (_WIDTH - _LEFT) / len(values)
    longest = max(map(len, names))
    every = max(1, round((longest * _CHARACTER + 8) / step + 0.49))
    height = _HEIGHT - _BOTTOM - _TOP
    parts = []
    for index, (value, name) in enumerate(zip(values, names, strict=True)):
        bar = height * value / top if top else 0
        x, y = _LEFT + index * step, _TOP + height - bar
        label = f"{escape(name)}: {value:,.{decimals}f}"
        parts.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{y:.1f}" width="{max(step - 2, 1):.1f}" height="{bar:.1f}">'
            f"<title>{label}</title></rect>"
        )
        if index % every == 0:
            parts.append(f'<text x="{x + step / 2:.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{escape(name)}</text>')
    axis = (
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{_TOP + height}" y2="{_TOP + height}"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end">{top:,.{decimals}f}</text>'
        f'<text x="0" y="10">{escape(y_label)}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP + height}" text-anchor="end">0</text>'
    )
    label = escape(f"{title}: {len(values)} bars, the highest {top:,.{decimals}f}")
    return (
        f'<section><h2>{escape(title)}</h2><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}{axis}</svg></section>"
    )
