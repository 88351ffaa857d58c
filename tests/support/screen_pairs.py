"""Preference pairs about drawn screens, and single-pass trainers on them with a processor."""

import datasets

from support.tiny_vision import screen
from support.trainers import SETTINGS
from trl_singlepass import SinglePassDPOConfig, SinglePassDPOTrainer


def user(text, *images):
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def screen_pair(folder, seed):
    """
    Return a pair about screens, and the images of each trajectory in the order in which its messages show them.

    The prompt shows two images of a column. In their second turn, the trajectories show images of files: one each, and
    the rejected one shows that of the chosen one as well.
    """
    shown = {name: screen(10 * seed + number, width=width) for number, (name, width) in enumerate(SCREENS.items())}
    parts = {}
    for name, image in shown.items():
        image.save(folder / f"{seed}-{name}.png")
        parts[name] = {"type": "image", "path": str(folder / f"{seed}-{name}.png")}
    pair = {
        "prompt": [user(f"What is at {seed}?", {"type": "image"}, {"type": "image"})],
        "chosen": [assistant(f"A button, {seed}."), user("And now?", parts["chosen"]), assistant("A field.")],
        "rejected": [assistant("No idea."), user("And now?", parts["rejected"], parts["chosen"]), assistant("No.")],
        "images": [shown["first"], shown["second"]],
    }
    orders = {"chosen": ("first", "second", "chosen"), "rejected": ("first", "second", "rejected", "chosen")}
    return pair, {side: [shown[name] for name in names] for side, names in orders.items()}


SCREENS = {"first": 16, "second": 24, "chosen": 16, "rejected": 16}


def text_pair(seed):
    """Return a pair without an image, in the same form."""
    pair = {"prompt": [user(f"What is at {seed}?")], "images": []}
    return {**pair, "chosen": [assistant("A button.")], "rejected": [assistant("I do not know.")]}


def some_pairs(folder):
    """Return pairs with images, one of text among them."""
    return [screen_pair(folder, 0)[0], text_pair(1), screen_pair(folder, 2)[0], screen_pair(folder, 3)[0]]


def pair_trainer(tmp_path, model, processor, pairs, reference, **settings):
    """Return a single-pass trainer on pairs, or on a dataset of them."""
    return SinglePassDPOTrainer(
        model,
        reference,
        SinglePassDPOConfig(str(tmp_path / "out"), **{**SETTINGS, "max_length": None, **settings}),
        train_dataset=datasets.Dataset.from_list(pairs) if isinstance(pairs, list) else pairs,
        processing_class=processor,
    )
