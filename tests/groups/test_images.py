"""Images in prompts: log-probabilities and gradients are those of lines run one by one, each image encoded once."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from support.float64_comparison import TOLERANCE, assert_same_gradients, gradients_of, pop_gradients
from support.groups import padded
from support.image_chats import END, START
from support.image_models import image_model, loader, references
from support.image_samples import PLACEHOLDER
from trl_singlepass import DataCollatorForSinglePass, enable_images, enable_tree
from trl_singlepass.groups.images import LineImages
from trl_singlepass.groups.lines import PaddedLines
from trl_singlepass.images.reading import TOKEN_TYPES
from trl_singlepass.trees.image_features import ImageReference


# Images of a prompt by name, the tokens behind each, and the completion, in which a tool may show another one.
GROUP = [
    (["small", "wide"], [5, 6, 7], [20, 21, 22]),
    (["small", "wide"], [5, 6, 7], [20, 23]),
    (["small", "other"], [5, 6, 7], [20, 21]),
    (["other"], [5, 6, 7], [20, 21, 24]),
    (["other"], [5, 6, 7], []),
    (["other"], [5, 6, 7], [20, "small", 21]),
]
SHOWN = [images + [item for item in completion if isinstance(item, str)] for images, _, completion in GROUP]
ONE_BY_ONE = ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "glm46v")
"""Families whose images are divided by their grids; others have the images of a line as one."""


def lines_of(sizes):
    """Return the tokens of the prompt and of the completion of each line."""

    def written(items):
        spans = [[START, *[PLACEHOLDER] * sizes[item], END] if isinstance(item, str) else [item] for item in items]
        return [token for span in spans for token in span]

    return [
        (written([3, *(item for image in images for item in (image, *behind))]), written(completion))
        for images, behind, completion in GROUP
    ]


def trl_inputs(model, family):
    """Return the images of all lines one after the other, as processors and TRL lay them out."""
    names = [name for images in SHOWN for name in images]
    batch = {"num_images": [len(images) for images in SHOWN]}
    if family in ("idefics3", "smolvlm"):  # one row per line, padded with empty tiles
        rows = [loaded(model, images)["pixel_values"][0] for images in SHOWN]
        most = max(map(len, rows))
        return {**batch, "pixel_values": torch.stack([F.pad(x, (0,) * 7 + (most - len(x),)) for x in rows])}
    if family == "internvl":
        batch["num_tiles"] = [len(loaded(model, images)["pixel_values"]) for images in SHOWN]
    return {**batch, **loaded(model, names)}


def loaded(model, names):
    return loader(model)([ImageReference(name, 0) for name in names])


def separate_log_probs(model, lines):
    """Run each line by itself, with its own images."""
    types = [name for name in TOKEN_TYPES if name in inspect.signature(type(model).forward).parameters]
    found = []
    for images, (prompt, completion) in zip(SHOWN, lines, strict=True):
        ids = torch.tensor([prompt + completion])
        kinds = dict.fromkeys(types, (ids == PLACEHOLDER).long())
        inputs = loaded(model, images)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kinds, **inputs).logits
        log_probs = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        of_image = ids[0, 1:] == PLACEHOLDER
        found.append(log_probs.masked_fill(of_image, 0)[len(prompt) - 1 :])
    return torch.cat(found)


FEW = ("qwen3_vl", "gemma3")
ALL = ("qwen2_5_vl", "qwen3_5", "glm46v", "gemma4", "idefics3", "smolvlm", "llava_onevision", "mistral3", "internvl")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("family", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL)])
def test_lines_with_images(family, in_rows):
    model = image_model(family)
    images = references(model, "small", "wide", "other")
    lines = lines_of({image.content: image.num_features for image in images})
    expected = separate_log_probs(model, lines)
    torch.manual_seed(0)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    gradients = pop_gradients(model)

    ids, mask, scored = padded(lines)
    shown = LineImages.find((ids == PLACEHOLDER).numpy(), trl_inputs(model, family))
    assert len(shown.inputs) == (3 if family in ONE_BY_ONE else 4)  # lists of images are different ones
    batch, collator = PaddedLines(ids, mask, shown), DataCollatorForSinglePass(0)
    enable_tree(model)
    enable_images(model, collator)
    view, labels = batch.merge(scored, batch.collator(collator), ids.shape[1] if in_rows else None)
    logits = model(input_ids=ids, tree=view).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    log_probs = log_probs.masked_fill(labels[:, 1:] < 0, 0)[scored[:, 1:].bool()]
    (log_probs * weights).sum().backward()
    torch.testing.assert_close(
        log_probs, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.detach().abs().max())
    )
    assert_same_gradients(gradients_of(model), gradients, 10 * TOLERANCE)
