"""What becomes of what a model generated in rollouts of several requests: trained by TRL, and saved by a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...trees.prefix_tree import PrefixTree
from ...trees.sample import Sample
from ...trees.shared_array import common_prefix_length


FORK_THRESHOLD = 1024  # TRL's default of AsyncGRPO


@dataclass(frozen=True)
class RolloutAudit:
    """Counts of rollouts: of requests, and of tokens."""

    num_rollouts: int
    num_requests: int
    num_generated: int
    num_trained_by_trl: int  # by AsyncGRPO with its default threshold; all here
    num_request_tokens: int  # of one row per request
    num_tree_tokens: int  # of one tree per rollout; those of a group share more

    def __str__(self) -> str:
        trained = self.num_trained_by_trl / self.num_generated
        return (
            f"{self.num_rollouts:,} rollouts of {self.num_requests / self.num_rollouts:.1f} requests; "
            f"{self.num_generated:,} tokens generated, of which TRL's AsyncGRPO trains {trained:.0%} by default; one "
            f"row per request has {self.num_request_tokens / self.num_tree_tokens:.2f} times the tokens of a tree"
        )


def audit_rollouts(fields: Mapping[str, Any], fork_threshold: int = FORK_THRESHOLD) -> RolloutAudit:
    """
    Return counts of the rollouts that a `rollout_func` returned, with `contexts`.

    AsyncGRPO goes on with the row of the request before if the new prompt begins with it. Where the prompt differs
    within the last output, by fewer tokens than the threshold, what differs becomes context. Otherwise a row begins.
    """
    trained, requests, tree = 0, [], 0
    for completion, contexts in zip(fields["completion_ids"], fields["contexts"], strict=True):
        outputs = np.split(np.asarray(completion, np.int64), np.cumsum([length for _, length in contexts])[:-1])
        own = [(np.asarray(prompt, np.int64), output) for (prompt, _), output in zip(contexts, outputs, strict=True)]
        requests += own
        trained += _num_trained(own, fork_threshold)
        samples = [Sample.from_prompt_and_completion(prompt, output) for prompt, output in own if len(output)]
        tree += len(PrefixTree.from_samples(samples))
    return RolloutAudit(
        num_rollouts=len(fields["contexts"]),
        num_requests=len(requests),
        num_generated=sum(len(output) for _, output in requests),
        num_trained_by_trl=trained,
        num_request_tokens=sum(len(prompt) + len(output) for prompt, output in requests if len(output)),
        num_tree_tokens=tree,
    )


def _num_trained(requests: Sequence[tuple[Any, Any]], fork_threshold: int) -> int:
    """Return the number of generated tokens of a rollout that AsyncGRPO trains."""
    held, is_trained, last = np.empty(0, np.int64), np.empty(0, bool), 0
    total = 0
    for prompt, output in requests:
        matched = common_prefix_length(held, prompt)
        drift = len(held) - matched
        if drift and not (matched >= last and drift < fork_threshold):
            total += int(is_trained.sum())
            is_trained, matched = is_trained[:0], 0
        is_context = np.zeros(len(prompt) - matched, bool)
        is_trained = np.concatenate([is_trained[:matched], is_context, np.ones(len(output), bool)])
        held, last = np.concatenate([prompt, output]), len(prompt)
    return total + int(is_trained.sum())
