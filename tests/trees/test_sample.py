"""A sample knows what each of its tokens belongs to, and refuses what cannot be trained."""

import pytest

from trl_singlepass import Sample


def test_truncation_cuts_reasoning_as_well():
    sample = Sample([5, 6, 7, 8, 9], [0, 0, 1, 1, 1], 2, message_index=3, reasoning_length=2, turn_index=1)
    cut = sample.truncated(3)
    assert (cut.token_ids.tolist(), cut.loss_weights.tolist()) == ([5, 6, 7], [0, 0, 1])
    assert (cut.prompt_length, cut.reasoning_length, cut.message_index, cut.turn_index) == (2, 1, 3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [0], 1), "one loss weight per token, got token_ids of shape"),
        (([], [], 0), "at least one token, got none"),
        (([1, 2], [0, -1], 1), "must be finite and not negative, got -1.0 as the smallest"),
        (([1, 2], [0, float("nan")], 1), "must be finite and not negative, got nan"),
        (([1, 2], [1, 1], 1), "so its loss weight must be 0, got 1.0. Start the prompt with at least one token"),
        (([1, 2], [0, 1], 3), r"prompt_length must lie between 0 and the number of tokens \(2\), got 3"),
        (([1, 2], [0, 1], 1, None, 2), r"between 0 and the length of the completion \(1\), got 2"),
    ],
)
def test_what_is_no_sample_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sample(*arguments)


def test_the_arrays_of_a_sample_cannot_be_changed():
    sample = Sample.from_prompt_and_completion([5], [6])
    with pytest.raises(ValueError, match="read-only"):
        sample.loss_weights[1] = 0
