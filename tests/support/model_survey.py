"""Try every model type of transformers on a tree; read and write the page with the results, docs/models.md."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.float64_comparison import assert_same_loss_and_gradients
from support.sample_sets import reasoning_chat
from support.tiny_causal_lms import OWN, tiny_model
from support.tiny_multimodal import classes_without_loss_arguments, tiny_conditional
from trl_singlepass.attention import tree_context
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.recurrent import path_dependent_layers
from trl_singlepass.reference import npass_loss_and_gradients, single_pass_loss_and_gradients
from trl_singlepass.reference.float64 import ForcedFloat64
from trl_singlepass.training.model import (
    UnsupportedModelError,
    check_every_layer_attended,
    check_model,
    enable_tree,
)
from trl_singlepass.trees.prefix_tree import PrefixTree, sample_paths
from trl_singlepass.trees.rows import Row
from trl_singlepass.trees.sample import Sample


PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@dataclass(frozen=True)
class Outcome:
    """One row of a table on the page."""

    name: str
    status: str
    remark: str = ""

    def __str__(self):
        return f"| `{self.name}` | {self.status} | {self.remark} |"


def branchy_chat():
    """A chat with a branch per turn, and short branches at many depths, shorter than any convolution."""
    chat = reasoning_chat(turns=3)
    spine = chat[-1].token_ids.tolist()
    samples = list(chat)
    for depth in (1, 2, 3, 9, 10, 20):
        branch = [50 + depth, 60][: 1 + depth % 2]
        samples.append(Sample(spine[:depth] + branch, [0.0] * depth + [1.0] * len(branch), depth))
    return samples


def survey(name):
    """
    Return the outcome for a model type, or for a class by its name: `exact`, or `refused` with the reason.

    Raises:
        AssertionError: If the model is accepted but its gradients are wrong.
    """
    model = tiny_model(name) if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else tiny_conditional(name)
    try:
        check_model(model)
    except UnsupportedModelError as error:
        return Outcome(name, "refused", _reason(str(error)))
    samples = branchy_chat()
    with ForcedFloat64():
        expected = npass_loss_and_gradients(model, samples)
        enable_tree(model)
        found = single_pass_loss_and_gradients(model, samples)
        assert_same_loss_and_gradients(found.loss, found.gradients, expected)
        assert_nothing_leaks(model, samples)
    return Outcome(name, "exact", remark_of(model))


def assert_nothing_leaks(model, samples):
    """Assert that every layer read the tree and that two samples' outputs depend on no token outside their paths."""
    tree = PrefixTree.from_samples(samples)
    batch = DataCollatorForSinglePass(pad_token_id=0)([Row.from_tree(tree).columns()])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    embeddings = []

    def capture(module, args, output):
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # some models go on in place

    handle = model.get_input_embeddings().register_forward_hook(capture)
    with tree_context(batch["tree_plan"], batch["subtree_end"], batch["position_ids"]) as context:
        logits = model(**inputs, use_cache=False).logits[0]
    handle.remove()
    check_every_layer_attended(model, context)
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
    sentence = re.split(r"\. (?:Train this|Load another) model", error)[0]
    return sentence.split(" ", 1)[1]


def names():
    """Return the names on the page: every causal language model type, then the classes of the second table."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *classes_without_loss_arguments()]


def read_page():
    """Return the transformers version of the page and its outcomes by name."""
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"transformers (\S+)\.", text).group(1)
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.*?) \|$", text, re.M)
    return version, {row[0]: Outcome(*row) for row in rows}


def write_page(outcomes):
    classes = set(classes_without_loss_arguments())
    tables = [[outcome for outcome in outcomes if (outcome.name in classes) == wanted] for wanted in (False, True)]
    counts = [", ".join(f"{_count(table, status)} {status}" for status in STATUSES) for table in tables]
    texts = (PREFACE.format(version=transformers.__version__, summary=counts[0]), CLASSES.format(summary=counts[1]))
    rows = ["".join(f"{outcome}\n" for outcome in sorted(table, key=_order)) for table in tables]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(texts[0] + rows[0] + texts[1] + rows[1], encoding="utf-8")


def _count(outcomes, status):
    return sum(outcome.status == status for outcome in outcomes)


def _order(outcome):
    return STATUSES.index(outcome.status), outcome.name


STATUSES = ["exact", "refused", "cannot be built here"]
PREFACE = """\
# Models

Every causal language model that transformers registers, by its `model_type`, and what happens to it in a single pass.
Surveyed with transformers {version}. {summary}.

A test writes and checks this page (`tests/training/test_model.py`): a tiny random model with one layer of each type in
its family runs a tree with branches at many depths, some of them shorter than any convolution.

- **exact**: the loss and the gradient of every parameter equal those of separate samples to 1e-12 in float64, and no
  output depends on a sibling branch.
- **refused**: `SinglePassSFTTrainer` raises an error with this reason before it prepares the dataset. No model is
  accepted and wrong.
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
CLASSES = """\

## Classes that read other media, on text

Generative classes with `accepts_loss_kwargs = False`, on rows of text and with tiny encoders. Among them are the
classes of the Qwen3-VL, Qwen3.5 and Gemma 4 checkpoints. {summary}.

For these, transformers' `Trainer` counts no tokens, and the stock trainer averages the means of batches. In a single
pass, every step is the mean over all its tokens, as for any other class.

| class | | layers of the tiny model, or reason |
|---|---|---|
"""
