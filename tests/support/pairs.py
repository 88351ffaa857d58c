"""Preference pairs."""

from support.conversations import chat, without_reasoning


def pair(turns=1, seed=0, rejected_turns=None):
    """Return a pair that answers the same first question; later turns ask different ones."""
    chosen, rejected = chat(turns, seed), chat(rejected_turns or turns, seed + 50)
    return {"prompt": chosen[:2], "chosen": chosen[2:], "rejected": rejected[2:]}


def pair_with_shared_turns(shared, turns, seed=0):
    """Return a pair whose trajectories have their first turns in common, behind a prompt of one question."""
    chosen, other = chat(turns, seed), chat(turns, seed + 50)
    border = 1 + 2 * shared
    return {"prompt": chosen[:2], "chosen": chosen[2:], "rejected": chosen[2:border] + other[border:]}


def plain(example):
    """Return a pair without reasoning, for templates that have no place for it."""
    return {name: without_reasoning(messages) for name, messages in example.items()}


SINGLE_TURNS = [pair(seed=seed) for seed in range(8)]
TRAJECTORIES = [pair(3, 0), pair(2, 1, rejected_turns=3), pair_with_shared_turns(1, 3, seed=2)]


def batch_of(trainer, pairs=slice(None)):
    """Return a batch of a trainer's prepared pairs."""
    rows = list(trainer.train_dataset)[pairs]
    return trainer._prepare_inputs(trainer.data_collator(rows))
