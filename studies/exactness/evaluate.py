"""Measure accuracy by turn, with greedy generation under the chat template that a server would use."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from trl.chat_template_utils import get_training_chat_template

from studies.exactness.task import answers


Messages = list[dict[str, str]]


class Answerer:
    """A trained model that continues conversations in batches."""

    def __init__(self, model: Any, tokenizer: Any, prompts_per_batch: int, max_new_tokens: int) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.prompts_per_batch, self.max_new_tokens = prompts_per_batch, max_new_tokens
        model.set_attn_implementation("sdpa")  # prompts are plain sequences

    def __call__(self, histories: Sequence[Messages], chat_template: str | None = None) -> list[Messages]:
        """Return the message that the model adds to each conversation, as a list of one."""
        prompts = [
            self.tokenizer.apply_chat_template(
                messages, chat_template=chat_template, add_generation_prompt=True, tokenize=False
            )
            for messages in histories
        ]
        size = self.prompts_per_batch
        texts = [text for i in range(0, len(prompts), size) for text in self._generate(prompts[i : i + size])]
        return [[_message(text)] for text in texts]

    @torch.inference_mode()
    def _generate(self, prompts: list[str]) -> list[str]:
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def _message(text: str) -> dict[str, str]:
    """Return generated text as a server would, with the reasoning separated from the answer."""
    reasoning, mark, answer = text.partition("</think>")
    if not mark:
        return {"role": "assistant", "content": text.strip()}
    return {
        "role": "assistant",
        "reasoning_content": reasoning.removeprefix("<think>").strip(),
        "content": answer.strip(),
    }


def given_history(answerer: Answerer, rows: Sequence[Any], chat_template: str | None = None) -> list[float]:
    """Return the accuracy by turn, with the correct answers to earlier turns in the history."""
    turns = len(answers(rows[0]))
    histories = [row["messages"][: 2 * turn + 1] for turn in range(turns) for row in rows]
    said = [message["content"] for [message] in answerer(histories, chat_template)]
    right = [answers(row)[turn] for turn in range(turns) for row in rows]
    return _by_turn([a == b for a, b in zip(said, right, strict=True)], turns)


def own_history(answerer: Answerer, rows: Sequence[Any]) -> list[float]:
    """Return the accuracy by turn, with the model's own answers to earlier turns in the history."""
    turns, histories, right = len(answers(rows[0])), [list[dict[str, str]]() for _ in rows], []
    for turn in range(turns):
        histories = [[*history, row["messages"][2 * turn]] for history, row in zip(histories, rows, strict=True)]
        histories = [history + new for history, new in zip(histories, answerer(histories), strict=True)]
        right += [history[-1]["content"] == answers(row)[turn] for history, row in zip(histories, rows, strict=True)]
    return _by_turn(right, turns)


def _by_turn(right: list[bool], turns: int) -> list[float]:
    """Return the mean of each turn, from a list ordered by turn."""
    size = len(right) // turns
    return [sum(right[i * size : (i + 1) * size]) / size for i in range(turns)]


def kept_history(answerer: Answerer, rows: Sequence[Any]) -> list[float]:
    """Like `given_history`, with the reasoning of all earlier turns in the prompt, which no server sends."""
    return given_history(answerer, rows, get_training_chat_template(answerer.tokenizer))


# `given` is the study's metric; `own` adds the model's mistakes, `kept` uses the contexts that some arms train on.
HISTORIES: dict[str, Callable[..., list[float]]] = {
    "given": given_history,
    "own": own_history,
    "kept": kept_history,
}


def accuracy(answerer: Answerer, rows: Sequence[Any]) -> dict[str, list[float]]:
    """Return the accuracy by turn on conversations of equal length, for every kind of history."""
    return {name: measure(answerer, rows) for name, measure in HISTORIES.items()}
