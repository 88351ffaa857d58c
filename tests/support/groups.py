"""Prompts that share a system message, and a reward for their completions."""

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
