"""Conversations with images become the tokens that a processor serves, and rows that refer to images."""

import numpy as np
import pytest

from support.tiny_vision import FAMILIES, screen, tiny_processor
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.images.placeholders import ImagePlaceholders


IMAGES = [screen(1), screen(2, 32, 16), screen(3, 16, 24), screen(4)]


def user(*parts):
    """A user message of texts and images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CHAT = [
    user(IMAGES[0], "What do you see?"),
    answer("A screen."),
    user("And here: ", IMAGES[1], IMAGES[0], " or there?"),
    answer("Two more."),
    user("Good."),
    answer("Thanks."),
]


def served(processor, messages):
    """Token ids and inputs of a prompt, as the processor makes them."""
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def shown_images(sample):
    """The content of each image that a sample shows, in order."""
    owners = [image.content for image in sample.images for _ in range(image.num_features)]
    starts = np.cumsum([0, *(image.num_features for image in sample.images[:-1])])
    return [owners[feature] for feature in sample.image_features if feature in starts]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_of_the_processor(family):
    processor = tiny_processor(family)
    samples = example_to_samples({"messages": CHAT}, 0, processor, RowSettings()).samples
    assert [sample.message_index for sample in samples] == [1, 3, 5]
    for sample in samples:
        expected = served(processor, CHAT[: sample.message_index])
        prompt = sample.token_ids[: sample.prompt_length]
        assert prompt.tolist() == expected["input_ids"][0].tolist()
        token_id = ImagePlaceholders(processor).token_id
        assert ((sample.image_features >= 0) == (sample.token_ids == token_id)).all()
    first, second, third = samples
    assert len(shown_images(first)) == 1
    a, b, again = shown_images(second)
    assert a == again != b
    assert shown_images(third) == shown_images(second)
