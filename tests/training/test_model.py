"""The survey of model types: what `docs/models.md` lists as exact is exact, and nothing is accepted and wrong."""

import os

import pytest
import transformers

from support.survey import PAGE, STATUSES, Outcome, model_types, read_page, survey, write_page
from support.tiny_configs import CANNOT_BE_BUILT


WRITES = os.environ.get("WRITE_MODELS_PAGE") == "1"
pytestmark = pytest.mark.filterwarnings("ignore")  # of models that nobody has looked after for years


@pytest.fixture(scope="session")
def found():
    """Collect outcomes; with `WRITE_MODELS_PAGE=1` and all model types run, the page is written from them."""
    outcomes = []
    yield outcomes
    if WRITES and len(outcomes) == len(model_types()):
        write_page(outcomes)


@pytest.mark.parametrize("model_type", model_types())
def test_model_type_is_what_the_page_says(model_type, found):
    if model_type in CANNOT_BE_BUILT:
        with pytest.raises(Exception):  # noqa: B017, PT011 (each fails in its own way)
            survey(model_type)
        outcome = Outcome(model_type, "cannot be built here", CANNOT_BE_BUILT[model_type])
    else:
        outcome = survey(model_type)
    found.append(outcome)
    if WRITES:
        return
    version, page = read_page()
    if version == transformers.__version__:
        assert outcome == page.get(model_type), f"{PAGE.name} is out of date: run this file with WRITE_MODELS_PAGE=1"
    elif model_type in page and page[model_type].status == "exact":
        assert outcome.status == "exact"


def test_page_lists_at_least_110_exact_model_types():
    _, page = read_page()
    statuses = [outcome.status for outcome in page.values()]
    assert statuses.count("exact") >= 110
    assert set(statuses) <= set(STATUSES)
    assert all(outcome.remark for outcome in page.values())
