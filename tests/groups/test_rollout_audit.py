"""The audit of rollouts counts what TRL's own worker would train, and what a tree of their requests saves."""

import random

import pytest

from support.rollouts import as_fields, scripted_rollout
from trl_singlepass import audit_rollouts


worker = pytest.importorskip("trl.experimental.async_grpo.async_rollout_worker")


@pytest.mark.parametrize("fork_threshold", [0, 3, 1024])
def test_trained_tokens_are_those_of_trls_rows(fork_threshold):
    rng = random.Random(0)
    rollouts = [scripted_rollout(rng, list(range(3, 20)), 60) for _ in range(40)]
    found = audit_rollouts(as_fields(rollouts), fork_threshold)
    expected = 0
    for requests in rollouts:
        turns = [worker.TurnRecord(prompt, output, [0.0] * len(output)) for prompt, output in requests]
        rows, _ = worker._chain_to_sequences(turns, "", fork_threshold)
        expected += sum(sum(row.completion_mask) for row in rows)
    assert found["trained_by_async_grpo"] == expected
    assert (found["trained_by_async_grpo"] == found["generated"]) == (fork_threshold == 0)
    assert found["generated"] == sum(len(output) for requests in rollouts for _, output in requests)
    assert found["in_trees"] < found["in_rows"]
