"""Rows of a batch of pairs or groups: prefixes stored once, examples split between turns, every turn in one row."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.chat_tokenizers import make_tokenizer
from support.pairs import TRAJECTORIES, pair
from support.prefix_tree_reference import labels_of
from support.preparation import pair_to_columns
from support.sample_sets import sample_sets, with_system
from support.trainers import dpo_trainer
from trl_singlepass.data.arrow import to_columns
from trl_singlepass.data.labelled_rows import pack_examples
from trl_singlepass.data.pairs import SIDES, example_to_pair
from trl_singlepass.data.rows import joined_row
from trl_singlepass.data.selection import fit_samples
from trl_singlepass.data.settings import PairSettings
from trl_singlepass.preference.collator import DataCollatorForSinglePassPreference


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("qwen3")


def rendered(examples, tokenizer):
    return [example_to_pair(example, index, tokenizer, PairSettings()) for index, example in enumerate(examples)]


def turns_by_reading_paths(packed):
    """Return prompt and completion of each turn, read token by token from a row: depth by depth, towards the root."""
    turns = {}
    for turn, positions in packed.positions.items():
        row = packed.row
        labels = labels_of(row)
        completion = [labels[position + 1] for position in positions]
        context = [int(row.input_ids[j]) for j in range(positions[0] + 1) if row.subtree_end[j] > positions[0]]
        turns[tuple(turn)] = context, completion
    return turns


def expected_turns(pairs):
    return {
        (side, index, number): (
            sample.token_ids[: sample.prompt_length].tolist(),
            sample.token_ids[sample.prompt_length :].tolist(),
        )
        for index, each in enumerate(pairs)
        for side, trajectory in enumerate(each.sides)
        for number, sample in enumerate(trajectory.samples)
    }


def paths_to_targets(row, positions):
    """Return, for each position that predicts a target, the tokens on its path and the target."""
    labels = labels_of(row)
    return [(row.input_ids[: p + 1][row.subtree_end[: p + 1] > p].tolist(), labels[p + 1]) for p in positions]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.integers(1, 3).flatmap(
        lambda size: st.lists(
            st.lists(sample_sets(max_samples=3), min_size=size, max_size=size), min_size=1, max_size=3
        )
    ),
    spare=st.none() | st.integers(0, 40),
)
def test_any_group_of_lists_keeps_its_targets(groups, spare):
    labels = [str(label) for label in range(len(groups[0]))]
    fitted = [[fit_samples(with_system(samples), None, "truncate") for samples in group] for group in groups]
    longest = max(len(sample) for group in fitted for each in group for sample in each.samples)
    limit = None if spare is None else longest + spare
    rows = [joined_row(dict(zip(labels, group, strict=True)), 0, limit) for group in fitted]
    columns = to_columns(rows, labels, has_images=False)
    examples = [{name: values[i] for name, values in columns.items()} for i in range(len(groups))]
    packed = pack_examples(examples, labels, limit)
    assert limit is None or max(len(each.row) for each in packed) <= limit
    found = [(turn, paths_to_targets(each.row, at)) for each in packed for turn, at in each.positions.items()]
    expected = {
        (label, example, number): [
            (sample.token_ids[:i].tolist(), sample.token_ids[i]) for i in np.flatnonzero(sample.loss_weights)
        ]
        for example, group in enumerate(fitted)
        for label, each in enumerate(group)
        for number, sample in enumerate(each.samples)
    }
    assert len(found) == len(expected)
    assert dict(found) == expected


# The trees have 150 to 400 tokens, the longest turn 131.
@pytest.mark.parametrize("max_row_tokens", [None, 1000, 300, 140])
def test_every_turn_stands_in_one_row_in_its_context(tokenizer, max_row_tokens):
    pairs = rendered(TRAJECTORIES * 2, tokenizer)
    rows = pack_examples([pair_to_columns(each, max_row_tokens) for each in pairs], SIDES, max_row_tokens)
    found = [turn for row in rows for turn in turns_by_reading_paths(row).items()]
    assert len(found) == len(dict(found))
    assert dict(found) == expected_turns(pairs)
    if max_row_tokens is None:
        assert len(rows) == 1
    else:
        assert max(len(row.row) for row in rows) <= max_row_tokens
        assert len(rows) > 1 or max_row_tokens == 1000
    assert sum(int(row.row.multiplicity.sum()) for row in rows) == sum(len(s) for p in pairs for s in p.samples)


def test_pairs_with_one_prompt_share_it(tokenizer):
    first, second = pair(2, 0), pair(2, 1)
    question = {"role": "user", "content": "Tell me all that you know about the numbers. " * 5}
    examples = [{**each, "prompt": [question]} for each in (first, second)]
    pairs = rendered(examples, tokenizer)
    prompt = min(sample.prompt_length for sample in pairs[0].samples)
    columns = [pair_to_columns(each) for each in pairs]
    (row,) = pack_examples(columns, SIDES)
    apart = sum(len(each["input_ids"]) for each in columns)
    assert prompt > 32
    assert apart - len(row.row) >= prompt - 1
    assert turns_by_reading_paths(row) == expected_turns(pairs)


def test_a_batch_names_the_tokens_of_each_trajectory_whatever_the_rows(tokenizer):
    pairs = rendered(TRAJECTORIES, tokenizer)
    whole, in_rows = (
        DataCollatorForSinglePassPreference(0, max_row_tokens=limit, pad_to_multiple_of=8)(
            [pair_to_columns(each, limit) for each in pairs]
        )
        for limit in (None, 140)
    )
    assert len(in_rows["tree"].rows) > 2
    for batch in (whole, in_rows):
        lines = [
            line[1:][mask[1:].bool()] for line, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]
        expected = [
            np.concatenate([s.token_ids[s.prompt_length :] for s in p.sides[side].samples])
            for side in (0, 1)
            for p in pairs
        ]
        assert [line.tolist() for line in lines] == [line.tolist() for line in expected]


def test_a_trainer_refuses_pairs_that_were_prepared_for_larger_rows(tmp_path, tokenizer):
    rows = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES).train_dataset
    assert dpo_trainer(tmp_path, tokenizer, rows, max_row_tokens=1000).train_dataset[:] == rows[:]
    with pytest.raises(ValueError, match="max_row_tokens=140"):
        dpo_trainer(tmp_path, tokenizer, rows, max_row_tokens=140)
