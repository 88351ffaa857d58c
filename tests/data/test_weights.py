"""Loss weights: what each reduction means, taken from its formula, and every error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_singlepass.data.settings import RowSettings
from trl_singlepass.data.tokenized_turns import tokenized_turns_to_samples
from trl_singlepass.data.weights import LossReduction, message_weights, weigh
from trl_singlepass.trees.sample import Sample


LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=5)


def samples_of(lengths, reasoning_length=0):
    samples = []
    for index, (prompt, completion) in enumerate(lengths):
        sample = Sample.from_prompt_and_completion([5] * prompt, [6] * completion, index)
        samples.append(Sample(sample.token_ids, sample.loss_weights, prompt, index, min(reasoning_length, completion)))
    return samples


def mean_loss(samples, nll):
    """The loss of a step: `Σ v · nll / Σ v`, with a made-up nll per token."""
    weights = np.concatenate([sample.loss_weights for sample in samples])
    return float((weights * nll).sum() / weights.sum())


def nll_of(samples):
    return np.random.default_rng(0).random(sum(map(len, samples)))


def split(values, samples):
    ends = np.cumsum([len(sample) for sample in samples])
    return [part[sample.prompt_length :] for part, sample in zip(np.split(values, ends[:-1]), samples, strict=True)]


@given(LENGTHS)
def test_token_reduction_is_the_mean_over_tokens(lengths):
    samples = samples_of(lengths)
    nll = nll_of(samples)
    weighed = weigh(samples, [1.0] * len(samples))
    assert mean_loss(weighed, nll) == pytest.approx(np.concatenate(split(nll, samples)).mean())


@given(LENGTHS)
def test_turn_reduction_is_the_mean_of_the_turns_means(lengths):
    samples = samples_of(lengths)
    nll = nll_of(samples)
    weighed = weigh(samples, [1.0] * len(samples), loss_reduction="turn")
    assert mean_loss(weighed, nll) == pytest.approx(np.mean([part.mean() for part in split(nll, samples)]))


@given(st.lists(LENGTHS, min_size=1, max_size=4))
def test_conversation_reduction_is_the_mean_of_the_conversations_means(conversations):
    groups = [samples_of(lengths) for lengths in conversations]
    everything = [sample for group in groups for sample in group]
    nll = nll_of(everything)
    weighed = [s for group in groups for s in weigh(group, [1.0] * len(group), loss_reduction="conversation")]
    parts = iter(split(nll, everything))
    means = [np.concatenate([next(parts) for _ in group]).mean() for group in groups]
    assert mean_loss(weighed, nll) == pytest.approx(np.mean(means))


def test_turn_reduction_counts_a_turn_as_often_as_its_message_weighs():
    samples = samples_of([(2, 3), (2, 5), (2, 4)])
    nll = nll_of(samples)
    weights = [2.0, 0.0, 0.5]
    weighed = weigh(samples, weights, loss_reduction="turn")
    means = [part.mean() for part in split(nll, samples)]
    assert mean_loss(weighed, nll) == pytest.approx(np.average(means, weights=weights))


@pytest.mark.parametrize("loss_reduction", list(LossReduction))
def test_reasoning_weight_scales_reasoning_within_a_turn(loss_reduction):
    samples = samples_of([(2, 6)], reasoning_length=4)
    nll = nll_of(samples)
    weighed = weigh(samples, [1.0], loss_reduction=loss_reduction, reasoning_weight=0.25)
    (part,) = split(nll, samples)
    assert mean_loss(weighed, nll) == pytest.approx(np.average(part, weights=[0.25] * 4 + [1] * 2))


def test_message_weights_read_weight_and_train():
    messages = [{}, {"weight": 2}, {"weight": None, "train": None}, {"train": False}, {"weight": 3.5, "train": False}]
    assert message_weights(messages) == [1.0, 2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "2", True])
def test_a_wrong_weight_is_named(weight):
    with pytest.raises(ValueError, match=r"Message 1 has weight="):
        message_weights([{}, {"weight": weight}])


def test_a_wrong_train_flag_is_named():
    with pytest.raises(ValueError, match=r"Message 0 has train='no'\. Set it to true or false"):
        message_weights([{"train": "no"}])


@pytest.mark.parametrize("weight", [1e39, 1e-300, 2**-40, float("nan")])
def test_a_weight_that_float32_loses_is_named_with_its_place(weight):
    with pytest.raises(ValueError, match=r"Message 1 .*weight"):
        message_weights([{"weight": 0}, {"weight": weight}])
    turn = {"prompt_ids": [1], "completion_ids": [2, 3], "completion_weights": [1, weight]}
    with pytest.raises(ValueError, match=r"Turn 1 .*completion_weights\[1\]"):
        tokenized_turns_to_samples([{"prompt_ids": [1], "completion_ids": [2]}, turn])
    with pytest.raises(ValueError, match="reasoning_weight"):
        RowSettings(reasoning_weight=weight)
