"""Conversations about drawn screens, for trainers with a processor, and the rows of images that N-pass trains."""

from support.conversations import expand
from support.paired_trainers import InOrder
from support.tiny_vision import screen, tiny_vision_model
from support.trainers import SETTINGS, as_dataset
from trl_singlepass import SinglePassSFTConfig


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
        parts = [{"type": "image"} for _ in shown] + [{"type": "text", "text": f"What is at {seed + turn}?"}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": f"A button, {seed * turn}."}]}
        if reasoning:
            answer["reasoning_content"] = f"We look at {turn}." + " Closely." * (seed % 3)
        messages += [{"role": "user", "content": parts}, answer]
    return {"messages": messages, "images": images}


def text_chat(seed=0, reasoning=True):
    """Return an example without an image, in the same form."""
    example = screen_chat(1, seed, reasoning)
    example["messages"][0]["content"] = [part for part in example["messages"][0]["content"] if part["type"] == "text"]
    return {**example, "images": []}


def expand_images(example):
    """Return `prompt` + `completion` + `images` rows, one per assistant message, with the images of the prompt."""
    rows = expand(example["messages"])
    shown = [sum(part["type"] == "image" for m in row["prompt"] for part in m["content"]) for row in rows]
    return [{**row, "images": example["images"][:count]} for row, count in zip(rows, shown, strict=True)]


def examples_of(family):
    """One to three turns each, and one example without an image."""
    reasoning = family == "qwen3_5"
    return [screen_chat(3 - seed % 3, seed, reasoning) for seed in range(7)] + [text_chat(7, reasoning)]


def settings_of(batch_size, accumulation):
    """Arguments of either trainer."""
    steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    return {**SETTINGS, "max_length": None, **steps}


def screen_trainer(output_dir, family, batch_size, accumulation=1):
    """Return the single-pass trainer of a family's tiny model on these examples, in their order."""
    model, processor = tiny_vision_model(family)
    return InOrder(
        model,
        SinglePassSFTConfig(str(output_dir), **settings_of(batch_size, accumulation)),
        train_dataset=as_dataset(examples_of(family)),
        processing_class=processor,
    )
