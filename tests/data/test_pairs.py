"""From examples to rows: turns as served, dataset forms, which turns count, what is lost and what is refused."""

import datasets
import numpy as np
import pytest

from support.conversations import AGENT_TOOLS, chat, tool_chat
from support.pairs import pair, pair_with_shared_turns
from support.prefix_tree_reference import labels_of
from support.preparation import pair_to_columns, prepare_pairs
from trl_singlepass.data.bad_rows import BadRowError, BadRows
from trl_singlepass.data.pairs import PAIR_COLUMNS, example_to_pair
from trl_singlepass.data.settings import PairSettings
from trl_singlepass.rendering.conversation import RenderingError
from trl_singlepass.trees.errors import DataError
from trl_singlepass.trees.rows import Row


def turns_by_hand(example, side, tokenizer, **kwargs):
    """Prompt and completion of each turn after the prompt, as anyone would render them."""
    messages, turns = example["prompt"] + example[side], []
    for k in range(len(example["prompt"]), len(messages)):
        if messages[k]["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True, tokenize=False, **kwargs)
            whole = tokenizer.apply_chat_template(messages[: k + 1], tokenize=False, **kwargs)
            assert whole.startswith(prompt)
            turns.append((prompt, whole[len(prompt) :]))
    return turns


def as_texts(side, tokenizer):
    texts = []
    for sample in side.samples:
        border = sample.prompt_length
        texts.append(tuple(tokenizer.decode(ids) for ids in (sample.token_ids[:border], sample.token_ids[border:])))
    return texts


def targets(row, side):
    """The trained tokens of a trajectory, read off its row."""
    labels = labels_of(Row.from_columns(row))
    return [labels[position + 1] for position in row[f"{side}_positions"]]


def prepared(examples, tokenizer, settings=None, **kwargs):
    rows = examples if not isinstance(examples, list) else datasets.Dataset.from_list(examples)
    return prepare_pairs(rows, tokenizer, settings or PairSettings(), **kwargs)


def columns_of_pairs(rows):
    """Return prepared pairs without the columns that were given, in which they may differ."""
    return rows.select_columns(list(PAIR_COLUMNS))[:]


@pytest.mark.parametrize("turns", [1, 3])
def test_every_turn_is_rendered_as_served(tokenizer, turns):
    example = pair(turns)
    rendered = example_to_pair(example, 0, tokenizer, PairSettings())
    for side in ("chosen", "rejected"):
        assert as_texts(getattr(rendered, side), tokenizer) == turns_by_hand(example, side, tokenizer)


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    messages = tool_chat()
    example = {
        "prompt": messages[:1],
        "chosen": messages[1:4],
        "rejected": [{"role": "assistant", "content": "5."}],
        "tools": AGENT_TOOLS,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    rendered = example_to_pair(
        {**example, "chosen": [{"role": "assistant", "content": "3."}]}, 0, tokenizer, PairSettings()
    )
    kwargs = {"tools": AGENT_TOOLS, "enable_thinking": False}
    expected = turns_by_hand({**example, "rejected": example["rejected"]}, "rejected", tokenizer, **kwargs)
    assert as_texts(rendered.rejected, tokenizer) == expected
    assert "find_city" in expected[0][0]


def test_the_row_holds_the_targets_of_each_trajectory_in_order(tokenizer):
    rendered = example_to_pair(pair(3), 0, tokenizer, PairSettings())
    row = pair_to_columns(rendered)
    for side in ("chosen", "rejected"):
        completions = [s.token_ids[s.prompt_length :] for s in getattr(rendered, side).samples]
        assert targets(row, side) == np.concatenate(completions).tolist()
        assert row[f"{side}_turn_lengths"].tolist() == list(map(len, completions))
    assert len(row["input_ids"]) < sum(map(len, rendered.samples))


def test_an_implicit_prompt_is_what_both_begin_with(tokenizer):
    explicit = pair(2)
    implicit = {side: explicit["prompt"] + explicit[side] for side in ("chosen", "rejected")}
    for form in (implicit, {**implicit, "prompt": None}):
        rows = prepared([form], tokenizer)
        assert columns_of_pairs(rows) == columns_of_pairs(prepared([explicit], tokenizer))


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}], ids=["no prompt", "null"])
def test_sides_without_a_prompt_that_do_not_begin_alike_are_a_bad_row(tokenizer, prompt):
    explicit = pair(1)
    chosen, rejected = (explicit["prompt"] + explicit[side] for side in ("chosen", "rejected"))
    apart = {"chosen": [{**chosen[0], "content": "Another question?"}, *chosen[1:]], "rejected": rejected, **prompt}
    with pytest.raises(DataError, match=r"Row 3: .*'prompt'"):
        example_to_pair(apart, 3, tokenizer, PairSettings())
    alike = {"chosen": chosen, "rejected": rejected, **prompt}
    rows = prepared([alike, apart, alike], tokenizer, bad_rows=BadRows.DROP)
    assert columns_of_pairs(rows) == columns_of_pairs(prepared([alike, alike], tokenizer))


def test_token_ids_are_pairs_of_one_turn(tokenizer):
    row = prepared([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}], tokenizer)[0]
    assert targets(row, "chosen") == [7]
    assert targets(row, "rejected") == [8, 9]


def test_only_the_last_turn(tokenizer):
    every = example_to_pair(pair(3), 0, tokenizer, PairSettings())
    last = example_to_pair(pair(3), 0, tokenizer, PairSettings(train_turns="last"))
    for side in ("chosen", "rejected"):
        (sample,) = getattr(last, side).samples
        assert np.array_equal(sample.token_ids, getattr(every, side).samples[-1].token_ids)
        assert getattr(last, side).counts["num_unselected_turns"] == 2


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_turns_from_the_first_difference_on(tokenizer, shared):
    example = pair_with_shared_turns(shared, 3)
    every = example_to_pair(example, 0, tokenizer, PairSettings())
    rest = example_to_pair(example, 0, tokenizer, PairSettings(train_turns="from_difference"))
    assert every.num_shared_turns == shared
    assert rest.num_shared_turns == 0
    for side in ("chosen", "rejected"):
        kept, last = getattr(rest, side).samples, getattr(every, side).samples[shared:]
        assert [sample.token_ids.tolist() for sample in kept] == [sample.token_ids.tolist() for sample in last]


def test_a_side_that_only_repeats_the_other_has_nothing_left_to_prefer(tokenizer):
    messages = chat(2)
    example = {"prompt": messages[:2], "chosen": messages[2:], "rejected": messages[2:3]}
    with pytest.raises(BadRowError, match=r"'rejected' has no turn left after the 1 that both trajectories share"):
        example_to_pair(example, 0, tokenizer, PairSettings(train_turns="from_difference"))
    assert len(example_to_pair(example, 0, tokenizer, PairSettings()).rejected.samples) == 1


def test_messages_without_weight_are_context(tokenizer):
    example = pair(2)
    example["chosen"][0] = {**example["chosen"][0], "train": False}
    rendered = example_to_pair(example, 0, tokenizer, PairSettings())
    assert len(rendered.chosen.samples) == 1
    assert len(rendered.rejected.samples) == 2
    example["chosen"][0] = {**example["chosen"][0], "train": True, "weight": 0.5}
    with pytest.raises(BadRowError, match=r"a message of 'chosen' has weight=0.5, but log π counts each token once"):
        example_to_pair(example, 0, tokenizer, PairSettings())


def test_a_pair_with_an_empty_side_is_dropped_and_counted(tokenizer):
    short = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}
    long = {"prompt_ids": [5] * 9, "chosen_ids": [7], "rejected_ids": [8]}
    rows = prepared([short, long], tokenizer, PairSettings(max_length=5))
    assert len(rows) == 1
    assert "(1 pair dropped whole; row 1: 10 tokens and 1 more)" in rows.info.description
    assert "equal" not in rows.info.description
    with pytest.raises(ValueError, match=r"No turn of the train dataset is trained: .*Raise max_length"):
        prepared([long], tokenizer, PairSettings(max_length=5))


def test_bad_rows_are_named_or_dropped(tokenizer):
    bad = {**pair(1), "rejected": [{"role": "user", "content": "And?"}]}
    with pytest.raises(RenderingError, match=r"Row 1: in 'rejected': .*assistant"):
        prepared([pair(1), bad], tokenizer)
    rows = prepared([pair(1), bad], tokenizer, bad_rows="drop")
    assert len(rows) == 1
    assert rows.info.description.startswith("1 bad row dropped (Row 1: in 'rejected'")


def test_a_pair_larger_than_a_row_is_split_and_a_turn_is_cut(tokenizer):
    whole = example_to_pair(pair(2), 0, tokenizer, PairSettings())
    longest = max(map(len, whole.samples))
    summary = prepared([pair(2)], tokenizer, PairSettings(max_row_tokens=longest)).info.description
    assert "1 pair longer than max_row_tokens split over several rows" in summary
    assert f"all {sum(side.counts['num_trained_tokens'] for side in whole.sides)} completion tokens" in summary
    cut = prepared([pair(2)], tokenizer, PairSettings(max_row_tokens=longest - 1)).info.description
    assert "not trained: 1 completion tokens past max_row_tokens" in cut


def test_overlong_turns_can_be_an_error(tokenizer):
    with pytest.raises(RenderingError, match=r"Row 0: in 'chosen': The turn at message 2 has \d+ tokens"):
        prepared([pair(1)], tokenizer, PairSettings(max_length=20, overlong_turns="error"))
