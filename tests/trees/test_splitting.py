"""Splitting: rows that fit, the fewest repeated tokens, the same loss, and no token lost that is not reported."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.conversations import chat, expand, tool_chat
from support.float64_comparison import assert_equal_to_npass, one_row_each
from support.sample_sets import reasoning_chat, sample_sets
from support.tiny_models import tiny_model
from support.trainers import largest_difference, logged, single_pass_trainer, stock_trainer
from trl_singlepass import render_samples
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.sample import Sample
from trl_singlepass.trees.splitting import split_samples


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def num_tokens(parts):
    return sum(len(PrefixTree.from_samples(part)) for part in parts)


def long_chat(turns, reasoning, seed=0, vocab_size=30000):
    """Samples of a chat with long reasoning that is dropped from history."""
    generator = np.random.default_rng(seed)

    def text(low, high):
        return generator.integers(5, vocab_size, generator.integers(low, high)).tolist()

    history, samples = text(100, 101), []
    for turn in range(turns):
        history += [1, *text(20, 50), 2, 3]
        answer = [*text(50, 80), 2]
        samples.append(Sample.from_prompt_and_completion(history, [4, *text(*reasoning), 4, *answer], 2 * turn + 1))
        history += answer
    return samples


def cuts(samples, max_row_tokens):
    """All ways to cut between turns such that each part fits a row."""
    for number in range(len(samples)):
        for borders in combinations(range(1, len(samples)), number):
            ends = [0, *borders, len(samples)]
            parts = [samples[a:b] for a, b in pairwise(ends)]
            if all(len(PrefixTree.from_samples(part)) <= max_row_tokens for part in parts):
                yield parts


@settings(max_examples=60)
@given(sample_sets(max_samples=6, max_length=12), st.integers(0, 20))
def test_no_cut_repeats_fewer_tokens(samples, spare):
    max_row_tokens = max(map(len, samples)) + spare
    parts = split_samples(samples, max_row_tokens)
    assert [sample for part in parts for sample in part] == samples
    assert all(len(PrefixTree.from_samples(part)) <= max_row_tokens for part in parts)
    fewest = min(map(num_tokens, cuts(samples, max_row_tokens)))
    assert num_tokens(parts) == fewest


def test_what_fits_is_not_split():
    samples = reasoning_chat(3)
    size = len(PrefixTree.from_samples(samples))
    assert split_samples(samples, size) == [samples]
    assert split_samples(samples, None) == [samples]
    assert len(split_samples(samples, size - 1)) == 2


def test_a_sample_longer_than_a_row_cannot_be_split():
    with pytest.raises(ValueError, match=r"A sample of 3 tokens does not fit into a row of max_row_tokens=2.*Shorten"):
        split_samples([Sample.from_prompt_and_completion([5, 6], [7])], 2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_split_conversations_are_exact(family):
    sets = [reasoning_chat(6), reasoning_chat(3, seed=1)]

    def split(sample_sets):
        parts = [part for samples in sample_sets for part in split_samples(samples, 120)]
        assert len(parts) > len(sample_sets)
        return one_row_each(parts)

    assert_equal_to_npass(tiny_model(family), sets, rows_of=split)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_a_conversation_of_64_turns_is_exact_in_rows_of_16k():
    samples = long_chat(64, (550, 950), vocab_size=97)
    assert len(PrefixTree.from_samples(samples)) > 55_000
    model = tiny_model("qwen3", attn_implementation="sdpa", hidden_size=16, num_attention_heads=2)
    assert_equal_to_npass(model, [samples], rows_of=lambda sets: one_row_each(split_samples(sets[0], 16384)))


CHATS = [chat(5), chat(2, seed=1), tool_chat()]


@pytest.mark.parametrize("packing", [False, True])
def test_split_training_equals_stock_on_the_samples(tmp_path, tokenizer, packing):
    settings = {"max_row_tokens": 200, "packing": packing}
    ours = single_pass_trainer(tmp_path, tokenizer, CHATS, per_device_train_batch_size=8, **settings)
    assert max(len(row["input_ids"]) for row in ours.train_dataset) <= 200
    assert 1 < len(ours.train_dataset) <= 8
    expanded = [row for messages in CHATS for row in expand(messages)]
    stock = stock_trainer(tmp_path, tokenizer, expanded, per_device_train_batch_size=len(expanded))
    ours.train()
    stock.train()
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), abs=1e-6)
    assert logged(ours, "num_trained_tokens") == [
        sum(float(sample.loss_weights.sum()) for messages in CHATS for sample in render_samples(messages, tokenizer))
    ]
    assert largest_difference(ours, stock) < 1e-6
