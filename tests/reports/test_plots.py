"""Pictures: every turn is named, in the order of the turns, and the picture is not blank."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from trl_singlepass import audit
from trl_singlepass.reports.curve_plots import plot_loss_by_turn, plot_sharing, plot_speedup
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
# Shorter than the history before it, and the spine ends in turn 2.
SHORT_LAST = [turn(U1, T1), turn(U1 + T1 + A1, T2 + A2), turn(U1 + A1, T3)]


def rendered(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return imread(buffer)


def turn_labels(figure):
    """Position (depth) of every label `turn k`, in the order of k."""
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text().startswith("turn ")]
    return [text.xy[0] for text in sorted(labels, key=lambda text: int(text.get_text().split()[1]))]


@pytest.mark.parametrize("samples", [STRIPPED, KEPT, TOOLS, SHORT_LAST], ids=["stripped", "kept", "tools", "short"])
def test_tree_labels_every_turn_where_it_ends(samples):
    figure = plot_tree(PrefixTree.from_samples(samples), Words())
    assert turn_labels(figure) == [len(sample) for sample in samples]
    assert rendered(figure).std() > 0.01


@pytest.mark.parametrize("samples", [STRIPPED, KEPT, TOOLS], ids=["stripped", "kept", "tools"])
def test_mask_names_every_turn(samples):
    figure = plot_mask(PrefixTree.from_samples(samples), Words())
    (axes,) = figure.axes
    titles = [label.get_text().splitlines()[0] for label in axes.get_yticklabels()]
    named = [number for title in titles for number in title.removeprefix("turns").removeprefix("turn").split(",")]
    assert sorted(map(int, named)) == list(range(1, len(samples) + 1))
    assert rendered(figure).std() > 0.01


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


# Curves --------------------------------------------------------------------------------------------------------------

METRICS = {
    "eval_loss": 2.0,
    "eval_turn_1/loss": 3.0,
    "eval_turn_1/accuracy": 0.1,
    "eval_turn_2/loss": 2.0,
    "eval_turn_10/loss": 1.0,
    "eval_turn_2/answer_loss": 1.5,
    "eval_all_turns/loss": 2.2,
}


def lines(figure):
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_losses_are_drawn_in_the_order_of_turns():
    figure = plot_loss_by_turn(METRICS)
    drawn = lines(figure)
    assert drawn == {"all": ([1, 2, 10], [3.0, 2.0, 1.0]), "answer": ([2], [1.5])}
    assert rendered(figure).std() > 0.01


def test_losses_need_metrics_by_turn():
    with pytest.raises(ValueError, match="log_turn_metrics=True"):
        plot_loss_by_turn({"loss": 1.0})


def test_sharing_is_that_of_the_report():
    tokenizer = make_tokenizer()
    report = audit([chat(1), chat(3), chat(3, seed=1)], tokenizer)
    figure = plot_sharing(report)
    (axes,) = figure.axes
    places = axes.collections[0].get_offsets()
    assert [tuple(place) for place in places] == [(e.num_turns, e.sharing_factor) for e in report.sharing_by_turns]
    assert places[0][1] == 1
    assert rendered(figure).std() > 0.01


def test_sharing_needs_a_conversation():
    with pytest.raises(ValueError, match="nothing is shared"):
        plot_sharing(audit([[{"role": "user", "content": "?"}]], make_tokenizer()))


def test_speedup_is_drawn_with_its_bound():
    drawn = lines(plot_speedup([2, 4], [1.0, 1.1], [1.04, 1.2]))
    assert drawn["measured"] == ([2, 4], [1.0, 1.1])
    assert drawn["bound: counted work"] == ([2, 4], [1.04, 1.2])
