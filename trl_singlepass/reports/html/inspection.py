"""One conversation as a page: tokens by role and weight, its tree, its mask, and the text of every turn."""

from __future__ import annotations

from html import escape
from typing import Any

from ..inspection import ROLES, Inspection
from .frame import frame


def inspection_page(inspection: Inspection, title: str) -> str:
    """
    Return a self-contained page that shows one conversation.

    Args:
        inspection (`Inspection`):
            The conversation.
        title (`str`):
            What to call it.

    Returns:
        `str`: HTML.
    """
    tree = inspection.tree
    summary = (
        f"{len(inspection.samples)} turns, {tree.num_sample_tokens:,} tokens as separate samples, {len(tree):,} as a "
        f"tree: sharing factor {tree.sharing_factor:.2f}"
    )
    legend = "".join(f'<li><span class="token {role}">{role}</span></li>' for role in ROLES)
    body = f"""<header>
<h1>{escape(title)}</h1>
<p>{summary}</p>
<ul class="legend" aria-label="Colours">{legend}<li><span class="token trained">trained</span></li></ul>
</header>
<nav aria-label="Turns" id="turns"></nav>
<main>
<div>
<section aria-labelledby="tree-title" class="tree"><h2 id="tree-title">Tree</h2>
<p class="hint">Depth from left to right; the history on top, a lane for every branch. Orange is trained.</p>
<div id="tree"></div></section>
<section aria-labelledby="tokens-title" class="tokens text"><h2 id="tokens-title">Tokens of the row</h2>
<p class="hint">Hover, or focus and use the arrow keys. Each block is a lane of the tree.</p>
<div id="tokens" tabindex="0" role="group" aria-label="Tokens"></div></section>
</div>
<div>
<section aria-labelledby="mask-title" class="mask"><h2 id="mask-title">Mask</h2>
<p class="hint">Row: a token; column: what it attends to.</p>
<canvas id="mask" role="img" aria-label="Attention mask"></canvas></section>
<section aria-labelledby="token-title" class="token-panel"><h2 id="token-title">Token</h2>
<dl id="token" aria-live="polite"></dl></section>
</div>
</main>
<dialog id="sample" aria-labelledby="sample-title"><h2 id="sample-title"></h2>
<p class="hint">What N-pass trains as one sequence. Left and right arrow: other turns; Escape: close.</p>
<div id="sample-text" class="text" tabindex="0"></div>
<form method="dialog"><button>Close</button></form></dialog>
<noscript>This page needs JavaScript. It loads nothing.</noscript>"""
    return frame(title, body, script="inspection.js", data=_data(inspection))


def _data(inspection: Inspection) -> dict[str, Any]:
    tree = inspection.tree
    turns = [
        {
            "message": sample.message_index,
            "prompt": sample.prompt_length,
            "reasoning": sample.reasoning_length,
            "path": _ranges(path.tolist()),
        }
        for sample, path in zip(inspection.samples, inspection.paths, strict=True)
    ]
    lanes = [
        {"start": run.start, "end": run.end, "depth": run.depth, "fork": run.prefix[-1][1] - 1 if run.prefix else -1}
        for run in inspection.plan.runs
    ]
    return {
        "text": list(inspection.texts),
        "role": [ROLES.index(role) for role in inspection.roles],
        "roles": list(ROLES),
        "weight": inspection.weights.tolist(),
        "target": list(inspection.targets),
        "depth": tree.position_ids.tolist(),
        "end": tree.subtree_end.tolist(),
        "multiplicity": tree.multiplicity.tolist(),
        "turns": turns,
        "lanes": lanes,
    }


def _ranges(positions: list[int]) -> list[list[int]]:
    """Positions as half-open ranges."""
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and ranges[-1][1] == position:
            ranges[-1][1] += 1
        else:
            ranges.append([position, position + 1])
    return ranges
