"""Sets of samples that make trees: random ones from a Hypothesis strategy, and fixed ones of a known shape."""

import numpy as np
from hypothesis import strategies as st

from trl_singlepass import Sample
from trl_singlepass.trees.sharing import MIN_SHARED_TOKENS


# Exact in float32, so that sums of weights are the same in every precision.
WEIGHTS = [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 1.0, 2.0]
# Long enough to be shared across conversations.
SYSTEM = [7, *range(5, 5 + MIN_SHARED_TOKENS + 8)]


@st.composite
def sample_sets(draw, vocab_size=97, max_samples=6, max_length=24, weights=tuple(WEIGHTS), trained=True):
    """
    Draw a list of samples, most of which continue a prefix of an earlier one.

    A small alphabet makes tokens coincide by chance: colliding targets, samples that are prefixes of others.
    """
    alphabet = draw(st.sampled_from([2, 3, vocab_size]))
    token = st.integers(0, alphabet - 1)
    samples = []
    for _ in range(draw(st.integers(1, max_samples))):
        prefix = _prefix_of_earlier(draw, samples)
        room = max_length - len(prefix)
        tokens = prefix + draw(st.lists(token, min_size=0 if prefix else 1, max_size=max(room, 1)))
        samples.append(Sample(tokens, _weights(draw, len(tokens), weights), draw(st.integers(0, len(tokens)))))
    if trained and not any(sample.loss_weights.any() for sample in samples):
        samples.append(Sample([0, 1], [0.0, 1.0], 1))
    return samples


def _prefix_of_earlier(draw, samples):
    if not samples or draw(st.integers(0, 4)) == 0:  # start a new tree
        return []
    earlier = draw(st.sampled_from(samples)).token_ids.tolist()
    return earlier[: draw(st.integers(0, len(earlier)))]


def _weights(draw, length, weights):
    """Draw uneven weights, spans of 0 and 1 as in chat data, or a single trained token at the end."""
    kind = draw(st.sampled_from(["uneven", "spans", "last"]))
    if kind == "uneven":
        drawn = draw(st.lists(st.sampled_from(weights), min_size=length, max_size=length))
    elif kind == "spans":
        borders = draw(st.lists(st.integers(0, length), min_size=2, max_size=6))
        drawn = np.searchsorted(np.sort(borders), np.arange(length), side="right") % 2
    else:
        drawn = np.arange(length) == length - 1
    return np.where(np.arange(length) == 0, 0.0, drawn)


def reasoning_chat(turns=4, vocab_size=97, seed=0):
    """Return a chat whose template drops the reasoning of earlier turns: a trunk with one branch per turn."""
    generator = np.random.default_rng(seed)

    def text(length):
        return generator.integers(5, vocab_size, length).tolist()

    history, samples = text(5), []
    for index in range(turns):
        history += [1, *text(4), 2, 3]
        reasoning, answer = [4, *text(6), 4], [*text(5), 2]
        samples.append(Sample.from_prompt_and_completion(history, reasoning + answer, 2 * index + 1))
        history += answer
    return samples


def branchy_chat():
    """A chat with a branch per turn, and short branches at many depths, shorter than any convolution."""
    chat = reasoning_chat(turns=3)
    trunk = chat[-1].token_ids.tolist()
    samples = list(chat)
    for depth in (1, 2, 3, 9, 10, 20):
        branch = [50 + depth, 60][: 1 + depth % 2]
        samples.append(Sample(trunk[:depth] + branch, [0.0] * depth + [1.0] * len(branch), depth))
    return samples


def nested_forks(levels=3, branches=2, vocab_size=97, seed=0):
    """Return a full tree: every branch forks again, so that a history is in several places of the row."""
    generator = np.random.default_rng(seed)
    samples = []

    def grow(history, level):
        for _ in range(branches):
            tokens = history + generator.integers(5, vocab_size, 5).tolist()
            if level == levels:
                samples.append(Sample.from_prompt_and_completion(history, tokens[len(history) :]))
            else:
                grow(tokens, level + 1)

    grow([1, 2, 3], 1)
    return samples


def branch_at_every_depth():
    """Return a trunk of 12 tokens with a branch of one to three tokens at each, and a branch on a branch."""
    trunk = list(range(5, 17))
    samples = [Sample(trunk, [0.0] + [1.0] * 11, 1)]
    for depth in range(1, 12):
        branch = [20 + depth, 40, 41][: 1 + depth % 3]
        samples.append(Sample(trunk[:depth] + branch, [0.0] * depth + [1.0] * len(branch), depth))
    samples.append(Sample([*trunk[:2], 22, 40, 41, 60, 61], [0.0] * 5 + [1.0] * 2, 5))
    samples.append(Sample([*trunk[:2], 22, 40, 41, 62], [0.0] * 5 + [1.0], 5))
    return samples


def with_system(samples):
    """Put the same long prefix before the samples of a conversation."""
    return [
        Sample([*SYSTEM, *sample.token_ids], [*[0] * len(SYSTEM), *sample.loss_weights], len(SYSTEM) + 1)
        for sample in samples
    ]
