"""Curves: the points are those of the metrics and reports that they show."""

import io

import pytest
from matplotlib.image import imread

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from trl_singlepass import audit
from trl_singlepass.reports.curve_plots import plot_loss_by_turn, plot_sharing


METRICS = {
    "eval_loss": 2.0,
    "eval_turn/1/loss": 3.0,
    "eval_turn/1/accuracy": 0.1,
    "eval_turn/2/loss": 2.0,
    "eval_turn/10/loss": 1.0,
    "eval_turn/2/answer_loss": 1.5,
    "eval_all_turns/loss": 2.2,
}


def rendered(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return imread(buffer)


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
