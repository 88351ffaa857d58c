"""Try every model type of transformers on a tree; read and write the page with the results, docs/models.md."""

import re
import textwrap
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from support.float64_comparison import assert_equal_to_npass
from support.image_models import COMPARED
from support.sample_sets import branchy_chat
from support.survey_pages import STATUSES, Outcome, counts, grouped, read_grouped, refused_by_check, write_part
from support.tiny_models import OWN, model_of_type
from support.tiny_multimodal import classes_without_loss_arguments, tiny_conditional
from support.tree_checks import checked
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.engine.enable import UnsupportedModelError, check_model, disable_tree
from trl_singlepass.engine.model_call import row_context
from trl_singlepass.images.reading import UnsupportedImagesError, check_reads_images
from trl_singlepass.recurrent.measurement import path_dependent_layers
from trl_singlepass.reference.verification import ForcedFloat64
from trl_singlepass.trees.prefix_tree import PrefixTree, sample_paths
from trl_singlepass.trees.rows import Row


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TEXT_MODELS, IMAGE_MODELS, OTHER_CLASSES = "text", "images", "other"
TABLES = {
    TEXT_MODELS: "| | layers of the tiny model, or reason | `model_type` |",
    IMAGE_MODELS: "| | layers of the tiny model, or reason | with images | `model_type` |",
    OTHER_CLASSES: "| | layers of the tiny model, or reason | class |",
}


def survey(table, name):
    """
    Return the outcome for a model type, or for a class by its name: `exact`, or `refused` with the reason.

    Raises:
        AssertionError: If the model is accepted but its gradients are wrong.
    """
    model = model_of_type(name) if table == TEXT_MODELS else tiny_conditional(class_of(table, name))
    try:
        check_model(model)
        implementation = model.config.get_text_config()._attn_implementation
        with ForcedFloat64():
            report = checked(model)
    except UnsupportedModelError as error:
        return not_exact(table, name, "refused", _reason(str(error)))
    if not report.ok:
        return not_exact(table, name, "refused", refused_by_check(report))
    disable_tree(model, implementation)
    images = with_images(model) if table == IMAGE_MODELS else None
    samples = branchy_chat()
    with ForcedFloat64():
        assert_equal_to_npass(model, [samples])
        assert_nothing_leaks(model, samples)
    return Outcome(name, "exact", remark_of(model), images)


def with_images(model):
    """
    Return what the page says of a model on images: `exact`, or `refused` with the error that it raises.

    Exact are the types that tests compare with N-pass (`tests/images`), and others whose model has the same class.
    """
    try:
        check_reads_images(model)
    except UnsupportedImagesError as error:
        sentence = str(error).split(". Train it")[0].split(" ", 1)[1]
        return f"refused: {sentence}"
    compared = {class_of(IMAGE_MODELS, name) for name in COMPARED}
    return "exact" if type(model).__name__ in compared else "not tried here"


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
    version = re.search(r"^With transformers (\S+):", PAGE.read_text(encoding="utf-8"), re.M).group(1)
    outcomes = {}
    for table in TABLES:
        outcomes |= {(table, name): outcome for name, outcome in read_grouped(PAGE, table).items()}
    return version, outcomes


def write_page(outcomes):
    """Write the tables of the page from outcomes by table and name."""
    for table, header in TABLES.items():
        own = [outcome for (where, _), outcome in sorted(outcomes.items()) if where == table]
        summary = f"With transformers {transformers.__version__}: {counts([o.status for o in own], STATUSES)}."
        if table == IMAGE_MODELS:
            summary += f" With images: {counts([str(o.images) for o in own], ('exact', 'refused'))}."
        columns = "|---" * (header.count("|") - 1)
        write_part(PAGE, table, "\n".join([summary, "", header, f"{columns}|", *grouped(own), ""]))
    classes = set(classes_without_loss_arguments())
    types = [f"`{name}`" for name, of in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if of in classes]
    write_part(PAGE, "uncounted", f"{textwrap.fill(', '.join(types), 118)}.\n")
