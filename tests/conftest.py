"""Set up all tests: no network, one thread, fixed seeds, and float64 that stays float64."""

import functools
import gc
import importlib.metadata
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
import transformers
from hypothesis import settings

from support.chat_tokenizers import make_tokenizer
from trl_singlepass.reference.verification import ForcedFloat64


# Hypothesis draws the same examples in every run, so a commit that breaks one fails in its own run.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.load_profile("default")
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
# accelerate reads from disk in every step whether PEFT is installed: an eighth of the time of tests that train.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


TRAINS = {Path(__file__).parent / room for room in ("cli", "data", "preference", "scripts", "training")}


def pytest_collection_modifyitems(items):
    """In rooms that train, ignore deprecations of TRL and transformers, which stock training gives as well."""
    ignored = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")
    for item in items:
        if TRAINS & set(item.path.parents):
            item.add_marker(ignored)


@pytest.fixture(autouse=True, scope="module")
def freeze_what_is_imported():
    """Leave what there is out of garbage collection: each `train` collects, and would look at all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    transformers.set_seed(0)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("qwen3")


@pytest.fixture
def float64():
    """Force float64 through code that asks for float32 by name."""
    with ForcedFloat64():
        yield
