"""Two ranks train every row of a stream once an epoch, whatever the lengths of their parts of it."""

from collections import Counter

import pytest

from support.conversations import chat
from support.worker_settings import assert_same_training, with_config


CHATS = [{"messages": chat(1 + seed % 3, seed=seed)} for seed in range(9)]
PACKED = {"packing": True, "max_row_tokens": 300}
# Shards, batches per step, settings. In the first three cases, an epoch is one step.
CASES = {
    "one shard": (1, 5, {}),
    "three shards": (3, 8, {}),
    "packed": (3, 4, PACKED),
    "several steps": (3, 2, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_row_is_trained_once_in_an_epoch(tmp_path, workers, one_process, case):
    """The parts end in the middle of an accumulated step."""
    num_shards, accumulation, config = CASES[case]
    settings = {"rows": CHATS, "num_shards": num_shards, "trainer": "counting"}
    steps = {"per_device_train_batch_size": 1, "max_steps": 6 if case == "several steps" else 2}
    settings = with_config(settings, gradient_accumulation_steps=accumulation, max_grad_norm=0.0, **steps, **config)
    run = workers.run(tmp_path, settings, world_size=2)
    # On one process, an epoch is one step.
    whole = {"per_device_train_batch_size": 9, "max_steps": 2, "max_grad_norm": 0.0}
    alone = one_process(with_config({"rows": CHATS, "trainer": "counting"}, **whole))
    first, second = (Counter(dict(seen)) for seen in run.seen)
    assert first != second
    assert first + second == Counter(dict(alone.seen[0]))
    per_epoch = len(run.loss) // 2
    assert run.num_trained_tokens[per_epoch - 1 :: per_epoch] == alone.num_trained_tokens
    if case != "several steps":  # a step is the mean over the tokens of an epoch, wherever they are
        assert_same_training(run, alone, 1e-5)
