"""The survey of model types: what `docs/models.md` lists as exact is exact, and nothing is accepted and wrong."""

import os

import pytest
import transformers

from support.image_models import COMPARED
from support.model_survey import (
    IMAGE_MODELS,
    PAGE,
    TEXT_MODELS,
    class_of,
    not_exact,
    read_page,
    rows,
    survey,
    write_page,
)
from support.slow import slow_but_for
from support.survey_pages import STATUSES
from support.tiny_models import CANNOT_BE_BUILT as TYPES_THAT_CANNOT
from support.tiny_models import KINDS
from support.tiny_multimodal import CANNOT_BE_BUILT as CLASSES_THAT_CANNOT
from support.tiny_multimodal import classes_without_loss_arguments


# One of each kind: plain, windows, experts, latent attention, other layers, an encoder made a decoder, and refused.
FAST = [
    (TEXT_MODELS, name)
    for name in (*KINDS, "llama", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "bert", "rwkv", "xlnet")
]
# Text models inside of models of other media, whose encoders are no reason to refuse: attention of their own is not.
FAST += [(IMAGE_MODELS, name) for name in ("gemma3", "lfm2_vl", "git", "diffusion_gemma", "got_ocr2")]
WRITES = os.environ.get("WRITE_MODELS_PAGE") == "1"
pytestmark = pytest.mark.filterwarnings("ignore")  # of models that nobody has looked after for years


@pytest.fixture(scope="session")
def found():
    """Collect outcomes; with `WRITE_MODELS_PAGE=1` and all rows run, the page is written from them."""
    outcomes = {}
    yield outcomes
    if WRITES and len(outcomes) == len(rows()):
        write_page(outcomes)


def why_not_built(table, name):
    """Return why the tiny model of a row cannot be built, `None` where it can."""
    return TYPES_THAT_CANNOT.get(name) if table == TEXT_MODELS else CLASSES_THAT_CANNOT.get(class_of(table, name))


@pytest.mark.parametrize(
    ("table", "name"),
    slow_but_for(FAST, rows()),
)
def test_model_is_what_the_page_says(table, name, found):
    if (why := why_not_built(table, name)) is not None:
        with pytest.raises(Exception):  # noqa: B017, PT011 (each fails in its own way)
            survey(table, name)
        outcome = not_exact(table, name, "cannot be built here", why)
    else:
        outcome = survey(table, name)
    found[table, name] = outcome
    if WRITES:
        return
    version, page = read_page()
    if version == transformers.__version__:
        assert outcome == page.get((table, name)), (
            f"{PAGE.name} is out of date: run this file with WRITE_MODELS_PAGE=1"
        )
    elif (table, name) in page and page[table, name].status == "exact":
        assert outcome.status == "exact"


def test_page_lists_at_least_110_and_70_exact_models():
    _, page = read_page()
    statuses = {table: [page[row].status for row in page if row[0] == table] for table in (TEXT_MODELS, IMAGE_MODELS)}
    assert statuses[TEXT_MODELS].count("exact") >= 110
    assert statuses[IMAGE_MODELS].count("exact") >= 70
    assert {outcome.status for outcome in page.values()} <= set(STATUSES)
    assert all(outcome.remark for outcome in page.values())


def test_page_says_of_each_type_that_is_exact_on_text_whether_it_is_with_images():
    _, page = read_page()
    found = {name: outcome for (table, name), outcome in page.items() if table == IMAGE_MODELS}
    exact = {name for name, outcome in found.items() if outcome.images == "exact"}
    refused = {name for name, outcome in found.items() if str(outcome.images).startswith("refused: ")}
    assert len(exact) >= 60
    untried = {name for name, outcome in found.items() if outcome.images == "not tried here"}
    assert untried <= {"unlimited_ocr"}
    assert exact | refused | untried == {name for name, outcome in found.items() if outcome.status == "exact"}
    assert set(COMPARED) <= exact


def test_page_lists_every_class_that_the_trainer_counts_no_tokens_for():
    classes = classes_without_loss_arguments()
    assert {"Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration"} <= set(classes)
    version, page = read_page()
    if version == transformers.__version__:
        assert set(classes) <= {class_of(table, name) for table, name in page if table != TEXT_MODELS}
