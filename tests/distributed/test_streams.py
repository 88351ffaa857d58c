"""Two ranks train every row of a stream once an epoch, whatever the lengths of their parts of it."""

from collections import Counter

import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from support.trainers import as_dataset
from support.worker_settings import assert_same_training, with_config
from trl_singlepass.data.preparation import conversations_to_rows
from trl_singlepass.data.settings import RowSettings


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
    rows = conversations_to_rows(as_dataset(CHATS), make_tokenizer("qwen3"), RowSettings())[0]
    expected = Counter(label for row in rows for label in row["labels"] if label != -100)
    first, second = (Counter(dict(seen)) for seen in run.seen)
    assert first != second
    assert first + second == Counter({token: 2 * count for token, count in expected.items()})
    per_epoch = len(run.loss) // 2
    assert run.num_trained_tokens[per_epoch - 1 :: per_epoch] == [expected.total(), 2 * expected.total()]
    if case != "several steps":  # a step is the mean over the tokens of an epoch, wherever they are
        alone = one_process(
            {"rows": CHATS, "config": {"per_device_train_batch_size": 9, "max_steps": 2, "max_grad_norm": 0.0}}
        )
        assert_same_training(run, alone, 1e-5)
