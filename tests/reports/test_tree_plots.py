"""Pictures: every turn is named, in the order of the turns, and the picture is not blank."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from support.image_samples import A, B, conversation_of
from trl_singlepass.reports.tree_plots import plot_mask, plot_tree
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.sample import Sample


class Words:
    """Decodes token 7 as `w7`."""

    def decode(self, token_ids):
        return " ".join(f"w{token}" for token in token_ids)


def turn(prompt, completion):
    return Sample.from_prompt_and_completion(prompt, completion)


U1, T1, A1, U2, T2, A2, U3, T3, A3 = (list(range(start, start + 9)) for start in range(0, 180, 20))
STRIPPED = [turn(U1, T1 + A1), turn(U1 + A1 + U2, T2 + A2), turn(U1 + A1 + U2 + A2 + U3, T3 + A3)]
KEPT = [turn(U1, T1 + A1), turn(U1 + T1 + A1 + U2, T2 + A2)]
# Two calls in one turn, which keep their reasoning, and a second user message that drops both.
TOOLS = [turn(U1, T1), turn(U1 + T1 + A1, T2), turn(U1 + A1 + U2, T3)]
# Shorter than the history before it, and the trunk ends in turn 2.
SHORT_LAST = [turn(U1, T1), turn(U1 + T1 + A1, T2 + A2), turn(U1 + A1, T3)]


def rendered(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return imread(buffer)


def labels_and_marks(axes):
    """Every label `turn k`, in the order of k, and the mark at the end of that turn."""
    labels = [text for text in axes.texts if text.get_text().startswith("turn ")]
    marks = [line for line in axes.lines if line.get_linewidth() > 1]
    pairs = zip(labels, marks, strict=True)
    return sorted(pairs, key=lambda pair: int(pair[0].get_text().split()[1]))


@pytest.mark.parametrize("samples", [STRIPPED, KEPT, TOOLS, SHORT_LAST], ids=["stripped", "kept", "tools", "short"])
def test_tree_labels_every_turn_in_its_lane_and_marks_where_it_ends(samples):
    figure = plot_tree(PrefixTree.from_samples(samples), Words())
    found = labels_and_marks(figure.axes[0])
    assert [mark.get_xdata()[0] for _, mark in found] == [len(sample) for sample in samples]
    assert all(label.xy[1] == sum(mark.get_ydata()) / 2 for label, mark in found)
    assert rendered(figure).std() > 0.01


def test_no_line_between_lanes_crosses_a_label():
    turns = [[*range(40 * k, 40 * k + 20)] for k in range(30)]
    samples = [turn([token for past in turns[:k] for token in past[:9]], turns[k][10:]) for k in range(1, 30)]
    figure = plot_tree(PrefixTree.from_samples(samples), Words())
    rendered(figure)
    (axes,) = figure.axes
    lines = [line.get_window_extent() for line in axes.lines if line.get_linewidth() < 1]
    labels = [label.get_window_extent() for label, _ in labels_and_marks(axes)]
    assert len(lines) == len(labels) - 1 == 28
    assert not [(label, line) for label in labels for line in lines if label.overlaps(line)]


def test_mask_shows_exactly_what_the_tree_allows():
    tree = PrefixTree.from_samples(STRIPPED)
    (axes,) = plot_mask(tree, Words()).axes
    shown = axes.images[0].get_array() > 0
    position = np.arange(len(tree))
    allowed = (position <= position[:, None]) & (position[:, None] < tree.subtree_end)
    assert (shown == allowed).all()


def test_tree_colours_the_trained_tokens():
    tree = PrefixTree.from_samples(STRIPPED)
    (axes,) = plot_tree(tree, Words()).axes
    legend = {
        text.get_text(): patch.get_facecolor()
        for patch, text in zip(axes.get_legend().get_patches(), axes.get_legend().get_texts(), strict=True)
    }
    drawn = {
        name: sum(bar.get_width() for bar in axes.patches if bar.get_facecolor() == colour)
        for name, colour in legend.items()
    }
    assert drawn == {"context": len(U1 + A1 + U2 + A2 + U3), "trained": len(T1 + A1 + T2 + A2 + T3 + A3)}


def test_images_are_drawn_in_every_place():
    samples = conversation_of([([1, A, 2, B, 3], [4]), ([1, A, 5, 2, B, B, 3], [6])])
    tree = PrefixTree.from_samples(samples)
    thumbnails = [np.full((2, 3, 3), shade, np.uint8) for shade in (0, 255)]
    drawn = plot_tree(tree, Words(), thumbnails).axes[0].images
    shown = sorted((image.get_array()[0, 0, 0], tuple(image.get_extent()[:2])) for image in drawn)
    # A in the history of both turns; B at depth 4 of the first, at depths 5 and 7 of the second.
    assert shown == [(0, (1, 3)), (255, (4, 6)), (255, (5, 7)), (255, (7, 9))]
    assert not plot_tree(tree, Words()).axes[0].images
