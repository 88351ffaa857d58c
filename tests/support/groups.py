"""Prompts that share a system message, a reward for their completions, and lines as TRL pads them."""

import torch
from datasets import Dataset

from support.tiny_vision import screen


SYSTEM = {"role": "system", "content": "You count pens and boxes, and you answer in a few words at most. " * 2}
QUESTIONS = ("How many pens are in 7 boxes?", "Is it cold?", "Split 54 pens.", "Name a city.")


def as_prompts():
    return Dataset.from_dict({"prompt": [[SYSTEM, {"role": "user", "content": question}] for question in QUESTIONS]})


def image_prompts():
    """Return prompts that show one image or two, some of them twice."""
    shown = [[screen(0)], [screen(1), screen(0)], [screen(2)], [screen(1), screen(3)]]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": question}], "images": images}
            for question, images in zip(QUESTIONS, shown, strict=True)
        ]
    )


def reward(completions, **kwargs):
    """A reward that differs within a group, whatever the model says."""
    return [float(len(completion[0]["content"]) % 7) for completion in completions]


def padded(lines):
    """Return ids, mask and what is scored of `(prompt, completion)`, padded on the left and on the right."""
    longest = [max(len(line[part]) for line in lines) for part in (0, 1)]
    ids, mask, scored = [], [], []
    for prompt, completion in lines:
        left, right = longest[0] - len(prompt), longest[1] - len(completion)
        ids.append([0] * left + prompt + completion + [0] * right)
        mask.append([0] * left + [1] * len(prompt + completion) + [0] * right)
        scored.append([0] * longest[0] + [1] * len(completion) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(scored)
