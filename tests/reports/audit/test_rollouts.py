"""The audit of rollouts counts what TRL's own worker would train, and what a tree of their requests saves."""

import random

import pytest

from support.rollouts import as_fields, scripted_rollout
from trl_singlepass.reports.audit.rollouts import audit_rollouts


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
    assert found.num_trained_by_trl == expected
    assert (found.num_trained_by_trl == found.num_generated) == (fork_threshold == 0)
    assert found.num_generated == sum(len(output) for requests in rollouts for _, output in requests)
    assert found.num_tree_tokens < found.num_request_tokens


def test_the_line_names_the_share():
    prompts = [3, 4], [3, 4, 7, 8]  # of the output `5 6 7`, the next prompt has only the 7
    fields = {"completion_ids": [[5, 6, 7, 9]], "contexts": [[(prompts[0], 3), (prompts[1], 1)]]}
    assert "25%" in str(audit_rollouts(fields))
