"""The survey of model types: what `docs/models.md` lists as exact is exact, and nothing is accepted and wrong."""

import os

import pytest
import transformers

from support.model_survey import PAGE, STATUSES, Outcome, names, read_page, survey, write_page
from support.tiny_causal_lms import CANNOT_BE_BUILT as TYPES_THAT_CANNOT
from support.tiny_multimodal import CANNOT_BE_BUILT as CLASSES_THAT_CANNOT
from support.tiny_multimodal import classes_without_loss_arguments


WRITES = os.environ.get("WRITE_MODELS_PAGE") == "1"
CANNOT_BE_BUILT = TYPES_THAT_CANNOT | CLASSES_THAT_CANNOT
pytestmark = pytest.mark.filterwarnings("ignore")  # of models that nobody has looked after for years


@pytest.fixture(scope="session")
def found():
    """Collect outcomes; with `WRITE_MODELS_PAGE=1` and all model types run, the page is written from them."""
    outcomes = []
    yield outcomes
    if WRITES and len(outcomes) == len(names()):
        write_page(outcomes)


@pytest.mark.parametrize("name", names())
def test_model_is_what_the_page_says(name, found):
    if name in CANNOT_BE_BUILT:
        with pytest.raises(Exception):  # noqa: B017, PT011 (each fails in its own way)
            survey(name)
        outcome = Outcome(name, "cannot be built here", CANNOT_BE_BUILT[name])
    else:
        outcome = survey(name)
    found.append(outcome)
    if WRITES:
        return
    version, page = read_page()
    if version == transformers.__version__:
        assert outcome == page.get(name), f"{PAGE.name} is out of date: run this file with WRITE_MODELS_PAGE=1"
    elif name in page and page[name].status == "exact":
        assert outcome.status == "exact"


def test_page_lists_at_least_110_exact_names():
    _, page = read_page()
    statuses = [outcome.status for outcome in page.values()]
    assert statuses.count("exact") >= 110
    assert set(statuses) <= set(STATUSES)
    assert all(outcome.remark for outcome in page.values())


def test_page_lists_every_class_that_the_trainer_counts_no_tokens_for():
    classes = classes_without_loss_arguments()
    assert {"Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration"} <= set(classes)
    version, page = read_page()
    if version == transformers.__version__:
        assert set(classes) <= set(page)


@pytest.mark.parametrize("class_name", ["Gemma3ForConditionalGeneration", "Lfm2VlForConditionalGeneration"])
def test_text_model_inside_a_model_of_other_media_is_as_exact_as_alone(class_name):
    assert survey(class_name).status == "exact"
