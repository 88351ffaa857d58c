"""Loss weights: what each reduction means, taken from its formula, and every error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_singlepass.data.selection import parse_train_turns, select_turns
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


@pytest.mark.parametrize("loss_reduction", list(LossReduction))
def test_a_conversation_of_weight_zero_stays_untrained(loss_reduction):
    (sample,) = weigh(samples_of([(2, 3)]), [0.0], loss_reduction=loss_reduction)
    assert not sample.is_trained


def test_message_weights_read_weight_and_train():
    messages = [{}, {"weight": 2}, {"weight": None, "train": None}, {"train": False}, {"weight": 3.5, "train": False}]
    assert message_weights(messages) == [1.0, 2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "2", True])
def test_a_wrong_weight_is_named(weight):
    with pytest.raises(ValueError, match=r"Message 1 has weight=.*number of 0 or more"):
        message_weights([{}, {"weight": weight}])


def test_a_wrong_train_flag_is_named():
    with pytest.raises(ValueError, match=r"Message 0 has train='no'\. Set it to true or false"):
        message_weights([{"train": "no"}])


@pytest.mark.parametrize(
    ("train_turns", "kept"),
    [("all", [0, 1, 2, 3]), ("last", [3]), (2, [0, 1]), ("2", [0, 1]), (9, [0, 1, 2, 3])],
)
def test_turns_are_selected_in_order(train_turns, kept):
    samples = samples_of([(1, 1)] * 4)
    assert [sample.message_index for sample in select_turns(samples, train_turns)] == kept


def test_sampled_turns_depend_on_seed_and_row_and_nothing_else():
    samples = samples_of([(1, 1)] * 20)

    def draw(**kwargs):
        return [sample.message_index for sample in select_turns(samples, "sample:5", **kwargs)]

    assert draw(seed=1, example_index=2) == draw(seed=1, example_index=2)
    assert len(draw()) == 5
    assert draw() == sorted(draw())
    assert len({tuple(draw(seed=seed, example_index=row)) for seed in range(3) for row in range(3)}) > 6


@pytest.mark.parametrize("train_turns", [0, -1, "first", "sample:", "sample:0", True, 1.5])
def test_an_unknown_choice_of_turns_is_named(train_turns):
    with pytest.raises(ValueError, match=r"train_turns=.* is none of 'all', 'last'"):
        parse_train_turns(train_turns)


def test_tokenised_turns_are_samples():
    turns = [
        {"prompt_ids": [5, 6], "completion_ids": [7], "completion_weights": None},
        {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9], "completion_weights": [0.5, 0]},
    ]
    first, second = tokenized_turns_to_samples(turns, vocab_size=10)
    assert first.token_ids.tolist() == [5, 6, 7]
    assert first.loss_weights.tolist() == [0, 0, 1]
    assert second.loss_weights.tolist() == [0, 0, 0, 0.5, 0]
    assert (second.prompt_length, second.message_index) == (3, 1)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "at least one turn"),
        ([{"prompt_ids": [1]}], "Turn 0 has no 'completion_ids'; got the keys"),
        ([{"prompt_ids": [1], "completion_ids": []}], "Turn 0 has empty 'completion_ids'"),
        ([{"prompt_ids": [], "completion_ids": [1]}], "Turn 0 has empty 'prompt_ids'"),
        ([{"prompt_ids": [1], "completion_ids": [10]}], "Turn 0 has the token id 10, but the vocabulary"),
        ([{"prompt_ids": [-1], "completion_ids": [1]}], "Turn 0 has the token id -1"),
        (
            [{"prompt_ids": [1], "completion_ids": [1], "completion_weights": [1, 1]}],
            "Turn 0 has 2 completion_weights for 1 completion tokens",
        ),
        (
            [{"prompt_ids": [1], "completion_ids": [1], "completion_weights": [-1]}],
            "Turn 0: Loss weights must be finite and not negative",
        ),
    ],
)
def test_wrong_turns_are_named(turns, message):
    with pytest.raises(ValueError, match=message):
        tokenized_turns_to_samples(turns, vocab_size=10)
