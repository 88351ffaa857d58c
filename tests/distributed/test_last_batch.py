"""Rows that only fill up the last step of an epoch add nothing to the load-balancing loss of a mixture of experts."""

import pytest

from support.slow import slow_but_for
from support.trainers import needs_weighted_loss
from support.worker_settings import with_config


pytestmark = needs_weighted_loss

EPOCH = {"max_steps": -1, "num_train_epochs": 1, "gradient_checkpointing": False}
SETTINGS = {"family": "qwen3-moe", "float64": True, "config": EPOCH}
# Rows, rows per batch, and batches of a rank per step. One rank of the last step repeats nothing but rows, or has new
# ones before them.
CASES = {"a row": (3, 1, 1), "part of a batch": (7, 3, 1), "a batch and a part": (5, 2, 1), "accumulation": (5, 1, 2)}


def assert_equal(assert_as_alone, case, engine="ddp", own=None, **settings):
    num_rows, batch_size, accumulated = CASES[case]
    settings = with_config({**SETTINGS, "num_rows": num_rows, **settings}, gradient_accumulation_steps=accumulated)
    own, alone = ({"per_device_train_batch_size": batch_size, **more} for more in (own or {}, {}))
    run = assert_as_alone(engine, settings, 1e-13, own, gradient_accumulation_steps=2 * accumulated, **alone)
    assert len(run.loss) == 2
    assert run.aux_loss == pytest.approx(run.alone.aux_loss, rel=1e-6)  # computed in float32 by transformers


@pytest.mark.parametrize("case", slow_but_for(["part of a batch"], CASES))
def test_two_ranks(assert_as_alone, case):
    assert_equal(assert_as_alone, case)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_waves(assert_as_alone, engine):
    assert_equal(assert_as_alone, "a row", engine, {"wave_tokens": 32})


@pytest.mark.slow
def test_a_stream(assert_as_alone):
    """The second rank runs out of rows, and gets a batch of two tokens."""
    assert_equal(assert_as_alone, "a row", num_shards=1, config={**EPOCH, "max_steps": 2})


@pytest.mark.slow
@pytest.mark.parametrize("waves", [{}, {"wave_tokens": 32}])
def test_ranks_that_share_rows(assert_as_alone, waves):
    assert_equal(assert_as_alone, "part of a batch", "ulysses", waves)
