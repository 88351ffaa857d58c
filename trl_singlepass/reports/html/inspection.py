"""One conversation as a page: tree, attention mask, tokens by role and weight, and the text of each turn."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO

import numpy as np

from ...images.loading import EncodedImage
from ...trees.image_features import ImageReference, image_of_feature
from ...trees.prefix_tree import PrefixTree
from ..inspection import Inspection, TokenRole
from . import frame


_THUMBNAIL = 160  # pixels of a side, at most


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
            "path": _to_ranges(path.tolist()),
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
        "weight": inspection.weights.tolist(),
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


def _to_ranges(positions: list[int]) -> list[list[int]]:
    """Return `[[0, 3], [7, 9]]` for `[0, 1, 2, 7, 8]`."""
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and ranges[-1][1] == position:
            ranges[-1][1] += 1
        else:
            ranges.append([position, position + 1])
    return ranges
