"""Samples merged from where each leaves the one before: the tree of separate samples, and the work of what is new."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_singlepass.trees import radix
from trl_singlepass.trees.prefix_tree import PrefixTree, lay_out, sample_paths
from trl_singlepass.trees.radix import RadixNode, SampleMerger
from trl_singlepass.trees.sample import Sample
from trl_singlepass.trees.shared_array import SharedArray


@st.composite
def conversations(draw):
    """Samples whose tokens continue those of any earlier one, with weights in prompts as well."""
    samples = []
    for index in range(draw(st.integers(1, 7))):
        prompt = SharedArray.whole([1], np.int64)
        if samples:
            tokens = draw(st.sampled_from(samples)).tokens
            prompt = tokens.head(draw(st.integers(1, len(tokens))))
        prompt = prompt.followed_by(np.array(draw(st.lists(st.integers(1, 2), max_size=3)), np.int64))
        completion = draw(st.lists(st.integers(1, 2), min_size=index == 0, max_size=3))
        sample = Sample.from_prompt_and_completion(prompt, completion, reasoning_length=len(completion) // 2)
        if draw(st.booleans()):
            weights = [
                0.0,
                *draw(st.lists(st.sampled_from([0, 1, 2]), min_size=len(sample) - 1, max_size=len(sample) - 1)),
            ]
            sample = Sample(sample.tokens, weights, sample.prompt_length, reasoning_length=sample.reasoning_length)
        samples.append(sample.with_turn_index(index))
    return samples


def merged_apart(samples):
    """The tree of whole samples, none of which is known to share anything, merged node by node."""
    root = RadixNode.root()
    for index, sample in enumerate(samples):
        tokens, weights, parts = (np.array(a) for a in (sample.token_ids, sample.loss_weights, sample.token_parts))
        root.add(RadixNode(tokens, weights, parts, 1, index))
    return lay_out(root)


@settings(max_examples=100)
@given(conversations())
def test_the_tree_is_that_of_separate_samples(samples):
    tree, expected = PrefixTree.from_samples(samples), merged_apart(samples)
    for name in ("input_ids", "subtree_end", "token_weights", "token_parts", "multiplicity", "position_ids"):
        assert getattr(tree, name).tolist() == getattr(expected, name).tolist(), name
    assert tree.segments == expected.segments
    merger = SampleMerger()
    for index, sample in enumerate(samples):
        merger.add(sample, index)
        assert merger.num_tokens == len(merged_apart(samples[: index + 1]))


def agent(turns, length=50):
    """Turns that each add a result and an answer to the prompt, and are trained on another text."""
    generator = np.random.default_rng(0)
    prompt, samples = SharedArray.whole([1], np.int64), []
    for _ in range(turns):
        prompt = prompt.followed_by(generator.integers(5, 1000, length))
        samples.append(Sample.from_prompt_and_completion(prompt, generator.integers(5, 1000, length)))
    return samples


def test_only_new_tokens_are_compared(monkeypatch):
    compared = []
    compare = radix.common_prefix_length
    monkeypatch.setattr(
        radix, "common_prefix_length", lambda a, b: compared.append(min(len(a), len(b))) or compare(a, b)
    )
    tree = PrefixTree.from_samples(agent(200))
    assert tree.sharing_factor > 50
    assert sum(compared) <= len(tree)


def test_a_tree_of_thousands_of_turns_is_not_too_deep():
    samples = agent(2000, length=2)
    tree, some = PrefixTree.from_samples(samples), samples[::500]
    for sample, path in zip(some, sample_paths(tree, some), strict=True):
        assert tree.input_ids[path].tolist() == sample.token_ids.tolist()
