"""Try every model type of transformers on a tree; read and write the page with the results, docs/models.md."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from support.float64_comparison import assert_same_loss_and_gradients
from support.image_survey import with_images
from support.sample_sets import reasoning_chat
from support.tiny_causal_lms import OWN, tiny_model
from support.tiny_multimodal import classes_without_loss_arguments, tiny_conditional
from support.tree_checks import checked
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.enable import (
    UnsupportedModelError,
    check_model,
    disable_tree,
    enable_tree,
)
from trl_singlepass.engine.model_call import row_context
from trl_singlepass.recurrent import path_dependent_layers
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients
from trl_singlepass.reference.float64 import ForcedFloat64
from trl_singlepass.trees.prefix_tree import PrefixTree, sample_paths
from trl_singlepass.trees.rows import Row
from trl_singlepass.trees.sample import Sample


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# The tables of the page, in their order.
TEXT_MODELS, IMAGE_MODELS, OTHER_CLASSES = TABLES = ("text", "images", "other")


@dataclass(frozen=True)
class Outcome:
    """One row of a table on the page."""

    name: str
    status: str
    remark: str = ""
    images: str | None = None

    def __str__(self):
        cells = [f"`{self.name}`", self.status, self.remark, *([] if self.images is None else [self.images])]
        return f"| {' | '.join(cells)} |"


def branchy_chat():
    """A chat with a branch per turn, and short branches at many depths, shorter than any convolution."""
    chat = reasoning_chat(turns=3)
    spine = chat[-1].token_ids.tolist()
    samples = list(chat)
    for depth in (1, 2, 3, 9, 10, 20):
        branch = [50 + depth, 60][: 1 + depth % 2]
        samples.append(Sample(spine[:depth] + branch, [0.0] * depth + [1.0] * len(branch), depth))
    return samples


def survey(table, name):
    """
    Return the outcome for a model type, or for a class by its name: `exact`, or `refused` with the reason.

    Raises:
        AssertionError: If the model is accepted but its gradients are wrong.
    """
    model = tiny_model(name) if table == TEXT_MODELS else tiny_conditional(class_of(table, name))
    try:
        check_model(model)
        implementation = model.config.get_text_config()._attn_implementation
        with ForcedFloat64():
            report = checked(model)
    except UnsupportedModelError as error:
        return not_exact(table, name, "refused", _reason(str(error)))
    if not report.ok:
        return not_exact(table, name, "refused", f"measured: {re.sub(_NUMBERS, '', report.reason)}")
    disable_tree(model, implementation)
    images = with_images(model) if table == IMAGE_MODELS else None
    samples = branchy_chat()
    with ForcedFloat64():
        expected = npass_loss_and_gradients(model, samples)
        enable_tree(model)
        found = single_pass_loss_and_gradients(model, samples)
        assert_same_loss_and_gradients(found.loss, found.gradients, expected)
        assert_nothing_leaks(model, samples)
    return Outcome(name, "exact", remark_of(model), images)


# The size of an error is not the same on every machine.
_NUMBERS = r" (?:by )?[(\d][^;]*(?=;|$)"


def not_exact(table, name, status, remark):
    """Return the outcome for a model that is not trained on text, and therefore not on images."""
    return Outcome(name, status, remark, "as on text" if table == IMAGE_MODELS else None)


def assert_nothing_leaks(model, samples):
    """Assert that two samples' outputs depend on no token outside their paths."""
    tree = PrefixTree.from_samples(samples)
    batch = DataCollatorForSinglePass(pad_token_id=0)([Row.from_tree(tree).columns()])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    embeddings = []

    def capture(module, args, output):
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # some models go on in place

    handle = model.get_input_embeddings().register_forward_hook(capture)
    with row_context(batch["tree"]):
        logits = model(**inputs, use_cache=False).logits[0]
    handle.remove()
    for index, path in enumerate(sample_paths(tree, samples)[:2]):
        (effect,) = torch.autograd.grad(logits[path[-1]].sum(), embeddings[0], retain_graph=True)
        effect = effect.reshape(len(tree), -1).abs().amax(-1)
        assert effect[path].max() > 0
        effect[path] = 0
        assert effect.max() == 0, f"sample {index} depends on a sibling"


def remark_of(model):
    """Return the layer types, how those that are not tree attention run, and whether there is an auxiliary loss."""
    config = model.config.get_text_config()
    parts = [", ".join(dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]))]
    modes = set(path_dependent_layers(model).values())
    if any(mode.starts_from_state for mode in modes):
        parts.append("states at forks")
    if any(mode.reach for mode in modes):
        parts.append("convolution tails at forks")
    if any(mode.attends for mode in modes):
        parts.append("attention on whole paths")
    if any(not (mode.starts_from_state or mode.reach or mode.attends) for mode in modes):
        parts.append("recurrence on whole paths")
    if getattr(config, "output_router_logits", False):
        parts.append("auxiliary loss")
    if OWN.get(config.model_type, {}).get("is_decoder"):
        parts.append("with `is_decoder=True`, refused without")
    return "; ".join(parts)


def _reason(error):
    sentence = re.split(r"\.? (?:Train this model|Load another model|Nothing was trained)", error)[0]
    return sentence.split(" ", 1)[1]


def class_of(table, name):
    """Return the name of the class of a row: the second table lists model types, the third one classes."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name] if table == IMAGE_MODELS else name


def rows():
    """Return table and name of every row of the page: two lists of model types, then classes that are in neither."""
    listed = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    names = {
        TEXT_MODELS: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        IMAGE_MODELS: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        OTHER_CLASSES: [name for name in classes_without_loss_arguments() if name not in listed],
    }
    return [(table, name) for table in TABLES for name in names[table]]


def read_page():
    """Return the transformers version of the page and its outcomes by table and name."""
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"transformers (\S+)\.", text).group(1)
    outcomes = {}
    for table, section in zip(TABLES, text.split("\n## "), strict=True):
        for row in re.findall(r"^\| `(.+?)` \| ([^|]+?) \| (.*?) \|(?: (.*?) \|)?$", section, re.M):
            outcomes[table, row[0]] = Outcome(*row[:3], row[3] or None)
    return version, outcomes


def write_page(outcomes):
    """Write the page from its outcomes by table and name."""
    sections = []
    for table, text in zip(TABLES, TEXTS, strict=True):
        own = sorted((outcome for (where, _), outcome in outcomes.items() if where == table), key=_order)
        summary = ", ".join(f"{_count(own, status)} {status}" for status in STATUSES)
        images = ", ".join(
            f"{sum(str(outcome.images).startswith(what) for outcome in own)} {what}" for what in ON_IMAGES
        )
        filled = text.format(version=transformers.__version__, summary=summary, images=images, uncounted=_uncounted())
        sections.append(filled + "".join(f"{outcome}\n" for outcome in own))
    PAGE.write_text("".join(sections), encoding="utf-8")


def _uncounted():
    """The model types of the second table whose batches the Trainer averages one by one."""
    classes = set(classes_without_loss_arguments())
    types = [name for name, of in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if of in classes]
    return textwrap.fill(", ".join(f"`{name}`" for name in types), 118)


def _count(outcomes, status):
    return sum(outcome.status == status for outcome in outcomes)


def _order(outcome):
    return STATUSES.index(outcome.status), outcome.name


STATUSES = ["exact", "refused", "cannot be built here"]
ON_IMAGES = ["exact", "refused"]
PREFACE = """\
# Models

Every causal language model that transformers registers, by its `model_type`, and what happens to it in a single pass.
Surveyed with transformers {version}. {summary}.

A test writes and checks this page (`tests/training/test_model.py`): a tiny random model with one layer of each type in
its family runs a tree with branches at many depths, some of them shorter than any convolution.

- **exact**: the loss and the gradient of every parameter equal those of separate samples to 1e-12 in float64, and no
  output depends on a sibling branch.
- **refused**: the trainer raises an error with this reason, before it prepares the dataset, or before the first step
  where the measured check finds it ("measured", or "does not run"). No model is accepted and wrong.
- **cannot be built here**: no tiny model could be built, so nothing is promised.

How layers other than plain attention run:

- *States at forks*: the layer runs over the history once, interrupted where branches leave it, and every branch starts
  from the state at its fork. Each token is computed once.
- *Convolution tails at forks*: the layer runs over each branch and the few preceding tokens that the convolution sees.
- *On whole paths*: the layer runs over each branch together with its history, because its kernel takes no initial
  state, or because it selects, pools or scores tokens by their index. That layer costs what it costs in N-pass; the
  rest of the model is shared. Attention of this kind needs `attn_implementation="sdpa"` or `"eager"`.

Mixture-of-experts models:

- A token that several samples share has the same context in all of them, so its router decides once what it would
  decide in each sample.
- *Auxiliary loss*: the load-balancing loss (`output_router_logits=True`) is a mean over tokens, in which a shared
  token must count once per sample. The model's `attention_mask` holds that number, and transformers weights tokens by
  it; the loss is that of all samples in one padded batch.
- Implementations that compute all experts at once (`grouped_mm`, `batched_mm`) do not support float64; in float32,
  they agree with N-pass to 1e-6.

| `model_type` | | layers of the tiny model, or reason |
|---|---|---|
"""
IMAGES = """\

## Models that read images

Every model type that `AutoModelForImageTextToText` loads, on rows of text, with a tiny encoder. How the encoder
attends is not asked: it reads an image at a time, and the tree is one of tokens. {summary}.

The last column says what happens with [images](images.md) to the types that are exact on text: {images}.
*Exact* means that loss and gradients, the encoder's too, equal those of separate samples that encode their own images
(`tests/images/test_survey.py` and `tests/images/test_exactness.py`, in float64 to 1e-12); model types with one class
share a test. *Refused* models raise the error before they are trained on images. They still train on text.

| `model_type` | | layers of the tiny model, or reason | with images |
|---|---|---|---|
"""
OTHERS = """\

## Classes that read other media, on text

Other generative classes with `accepts_loss_kwargs = False`, on rows of text and with tiny encoders.
{summary}.

For these, and for the following model types of the table above, transformers' `Trainer` counts no tokens, and the
stock trainer averages the means of batches. In a single pass, every step is the mean over all its tokens, as for any
other class.

{uncounted}.

| class | | layers of the tiny model, or reason |
|---|---|---|
"""
TEXTS = (PREFACE, IMAGES, OTHERS)
