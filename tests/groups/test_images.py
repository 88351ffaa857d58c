"""Images in prompts: log-probabilities and gradients are those of lines run one by one, each image encoded once."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from support.float64_comparison import TOLERANCE, gradients_of
from support.image_models import END, START, image_model, loader, references
from support.image_samples import PLACEHOLDER
from trl_singlepass import DataCollatorForSinglePass, enable_images, enable_tree
from trl_singlepass.groups.images import LineImages
from trl_singlepass.groups.lines import PaddedLines
from trl_singlepass.images.reading import TOKEN_TYPES
from trl_singlepass.trees.image_features import ImageReference


# Images of a prompt by name, the tokens behind each, and the completion.
GROUP = [
    (["small", "wide"], [5, 6, 7], [20, 21, 22]),
    (["small", "wide"], [5, 6, 7], [20, 23]),
    (["small", "other"], [5, 6, 7], [20, 21]),
    (["other"], [5, 6, 7], [20, 21, 24]),
    (["other"], [5, 6, 7], []),
]
ONE_BY_ONE = ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "glm46v")
"""Families whose images are divided by their grids; others have the images of a line as one."""


def lines_of(sizes):
    """Return the tokens of each line, and which of them are of its completion."""
    lines = []
    for images, behind, completion in GROUP:
        prompt = [3]
        for image in images:
            prompt += [START, *[PLACEHOLDER] * sizes[image], END, *behind]
        lines.append((prompt, completion))
    return lines


def padded(lines):
    longest = [max(len(line[part]) for line in lines) for part in (0, 1)]
    ids, mask, scored = [], [], []
    for prompt, completion in lines:
        left, right = longest[0] - len(prompt), longest[1] - len(completion)
        ids.append([0] * left + prompt + completion + [0] * right)
        mask.append([0] * left + [1] * len(prompt + completion) + [0] * right)
        scored.append([0] * longest[0] + [1] * len(completion) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(scored)


def trl_inputs(family):
    """Return the images of all lines one after the other, as processors and TRL lay them out."""
    names = [name for images, _, _ in GROUP for name in images]
    batch = {"num_images": [len(images) for images, _, _ in GROUP]}
    if family in ("idefics3", "smolvlm"):  # one row per line, padded with empty tiles
        rows = [loaded(family, images)["pixel_values"][0] for images, _, _ in GROUP]
        most = max(map(len, rows))
        return {**batch, "pixel_values": torch.stack([F.pad(x, (0,) * 7 + (most - len(x),)) for x in rows])}
    if family == "internvl":
        batch["num_tiles"] = [len(loaded(family, images)["pixel_values"]) for images, _, _ in GROUP]
    return {**batch, **loaded(family, names)}


def loaded(family, names):
    return loader(family)([ImageReference(name, 0) for name in names])


def separate_log_probs(model, family, lines):
    """Run each line by itself, with its own images."""
    types = [name for name in TOKEN_TYPES if name in inspect.signature(type(model).forward).parameters]
    found = []
    for (images, _, _), (prompt, completion) in zip(GROUP, lines, strict=True):
        ids = torch.tensor([prompt + completion])
        kinds = dict.fromkeys(types, (ids == PLACEHOLDER).long())
        inputs = loaded(family, images)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kinds, **inputs).logits
        log_probs = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        found.append(log_probs[len(prompt) - 1 :])
    return torch.cat(found)


FEW = ("qwen3_vl", "gemma3")
ALL = ("qwen2_5_vl", "qwen3_5", "glm46v", "gemma4", "idefics3", "smolvlm", "llava_onevision", "mistral3", "internvl")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("family", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL)])
def test_lines_with_images(family, in_rows):
    model = image_model(family)
    images = references(model, family, "small", "wide", "other")
    lines = lines_of({image.content: image.num_features for image in images})
    expected = separate_log_probs(model, family, lines)
    torch.manual_seed(0)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    gradients = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    model.zero_grad()

    ids, mask, scored = padded(lines)
    shown = LineImages.find((ids == PLACEHOLDER).numpy(), trl_inputs(family))
    assert len(shown.inputs) == 3  # "small", "wide" and "other", or the three lists of them
    batch, collator = PaddedLines(ids, mask, shown), DataCollatorForSinglePass(0)
    enable_tree(model)
    enable_images(model, collator)
    merged = batch.merge(scored, batch.collator(collator), ids.shape[1] if in_rows else None)
    logits = model(input_ids=ids, tree=merged.view).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][scored[:, 1:].bool()]
    (log_probs * weights).sum().backward()
    torch.testing.assert_close(
        log_probs, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.detach().abs().max())
    )
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert float((gradients_of(model)[name] - gradient).abs().max()) <= 10 * TOLERANCE * largest, name
