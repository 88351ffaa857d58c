"""Pairs of trajectories that a model has sampled itself, ranked by how many of their answers are right."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import set_seed

from studies.exactness.evaluate import Answerer
from studies.exactness.task import Conversation, answers


class Sampler(Answerer):
    """A model that draws its answers."""

    @torch.inference_mode()
    def _generate(self, prompts: list[str]) -> list[str]:
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=True, top_k=0)
        return self.tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def sample(sampler: Answerer, rows: Sequence[Conversation], seed: int) -> list[Conversation]:
    """Return each conversation with the model's own answers, in the contexts that it is served."""
    set_seed(seed)
    most = max(len(answers(row)) for row in rows)
    histories: list[list[dict[str, str]]] = [[] for _ in rows]
    for turn in range(most):
        asked = [i for i, row in enumerate(rows) if turn < len(answers(row))]
        for i in asked:
            histories[i] = [*histories[i], rows[i]["messages"][2 * turn]]
        for i, new in zip(asked, sampler([histories[i] for i in asked]), strict=True):
            histories[i] = histories[i] + new
    return [{"messages": messages} for messages in histories]


def num_right(sampled: Conversation, row: Conversation) -> int:
    """Return how many answers are those of the task."""
    return sum(a == b for a, b in zip(answers(sampled), answers(row), strict=True))


def is_well_formed(sampled: Conversation) -> bool:
    """Whether every turn has reasoning and an answer, so that all templates can render it."""
    return all(
        message["role"] == "user" or (message.get("reasoning_content") and message["content"])
        for message in sampled["messages"]
    )


def best_and_worst(samples: Sequence[Conversation], row: Conversation) -> dict[str, Any] | None:
    """Return the sample with the most right answers as chosen and that with the fewest as rejected, if they differ."""
    ranked = sorted(filter(is_well_formed, samples), key=lambda sampled: num_right(sampled, row))
    if not ranked or num_right(ranked[0], row) == num_right(ranked[-1], row):
        return None
    chosen, rejected = ranked[-1]["messages"], ranked[0]["messages"]
    return {"prompt": chosen[:1], "chosen": chosen[1:], "rejected": rejected[1:]}


def sample_pairs(sampler: Answerer, rows: Sequence[Conversation], num_samples: int, seed: int) -> list[dict[str, Any]]:
    """Return a pair for each conversation whose samples differ in the number of right answers."""
    samples = [sample(sampler, rows, seed + 1000 * number) for number in range(num_samples)]
    pairs = [best_and_worst(of_row, row) for of_row, row in zip(zip(*samples, strict=True), rows, strict=True)]
    return [pair for pair in pairs if pair is not None]
