"""Conversations and preference pairs about drawn screens, and the rows of images that N-pass trains."""

from support.conversations import expand
from support.image_forms import answer
from support.tiny_vision import screen


def user(text, *images):
    """Return a user message of images and a text."""
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def screen_chat(turns, seed=0, reasoning=True):
    """
    Return an example of `turns` answers about screens, as a dataset holds it: `messages` and `images`.

    The first message shows two images, every other turn shows one more, and the last turn shows the first one again.
    """
    messages, images = [], []
    for turn in range(turns):
        shown = [screen(10 * seed), screen(10 * seed + 1, width=24)] if turn == 0 else []
        if turn and turn == turns - 1:
            shown = [images[0]]
        elif turn % 2:
            shown = [screen(10 * seed + turn + 1, height=24)]
        images += shown
        reply = answer(f"A button, {seed * turn}.")
        if reasoning:
            reply["reasoning_content"] = f"We look at {turn}." + " Closely." * (seed % 3)
        messages += [user(f"What is at {seed + turn}?", *[{"type": "image"} for _ in shown]), reply]
    return {"messages": messages, "images": images}


def expand_images(example):
    """Return `prompt` + `completion` + `images` rows, one per assistant message, with the images of the prompt."""
    rows = expand(example["messages"])
    shown = [sum(part["type"] == "image" for m in row["prompt"] for part in m["content"]) for row in rows]
    return [{**row, "images": example["images"][:count]} for row, count in zip(rows, shown, strict=True)]


def examples_of(family):
    """One to three turns each, and one example without an image."""
    reasoning = family == "qwen3_5"
    text = screen_chat(1, 7, reasoning)
    text["messages"][0] = user("What is at 7?")
    return [*(screen_chat(3 - seed % 3, seed, reasoning) for seed in range(7)), {**text, "images": []}]


SCREENS = {"first": 16, "second": 24, "chosen": 16, "rejected": 16}


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
        "chosen": [answer(f"A button, {seed}."), user("And now?", parts["chosen"]), answer("A field.")],
        "rejected": [answer("No idea."), user("And now?", parts["rejected"], parts["chosen"]), answer("No.")],
        "images": [shown["first"], shown["second"]],
    }
    orders = {"chosen": ("first", "second", "chosen"), "rejected": ("first", "second", "rejected", "chosen")}
    return pair, {side: [shown[name] for name in names] for side, names in orders.items()}


def text_pair(seed):
    """Return a pair without an image, in the same form."""
    pair = {"prompt": [user(f"What is at {seed}?")], "images": []}
    return {**pair, "chosen": [answer("A button.")], "rejected": [answer("I do not know.")]}


def some_pairs(folder):
    """Return pairs with images, one of text among them."""
    return [screen_pair(folder, 0)[0], text_pair(1), screen_pair(folder, 2)[0], screen_pair(folder, 3)[0]]
