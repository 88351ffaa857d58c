"""Each model on each engine, in each way to run a row: two ranks train what one process trains."""

import os

import pytest

from support.engine_matrix import (
    CELLS,
    ENGINES,
    MODELS,
    TOLERANCE,
    WAYS,
    largest_difference,
    settings_of,
    write_results,
)
from support.trainers import needs_weighted_loss
from support.worker_settings import assert_engine, on_engine, with_config


WRITES = os.environ.get("WRITE_ENGINES_PAGE") == "1"
# What is not written again is tried where each two of engine, model and way meet: a Latin square.
TRIED = [
    (engine, model, way)
    for engine, model, way in CELLS
    if WRITES or (list(ENGINES).index(engine) + list(MODELS).index(model)) % len(WAYS) == list(WAYS).index(way)
]
pytestmark = [pytest.mark.slow, needs_weighted_loss]  # whose fused head the worker keeps in float64


@pytest.fixture(scope="module")
def found():
    """Collect largest differences; with `WRITE_ENGINES_PAGE=1`, the page is written from those of whole columns."""
    differences = {}
    yield differences
    if WRITES:
        write_results(differences)


@pytest.mark.parametrize(("engine", "model", "way"), TRIED)
def test_two_ranks_train_what_one_process_trains(tmp_path, workers, one_process, found, engine, model, way):
    settings = settings_of(model, way)
    alone = one_process(with_config(settings, gradient_accumulation_steps=2))
    assert len(alone.loss) == 2
    settings, environment = on_engine(engine, settings)
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert_engine(run, engine)
    assert ("wave_tokens" in settings["config"]) == (max(run.num_waves, default=1) > 1)
    difference = largest_difference(run, alone)
    found[engine, model, way] = difference
    assert difference <= TOLERANCE
