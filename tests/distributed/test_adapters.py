"""Adapters that mix the tokens of a row are found on every engine, on all ranks together, and named."""

import pytest

from support.worker_settings import ENGINES, assert_engine, on_engine


pytest.importorskip("peft", minversion="0.21")

# FSDP2 does not shard the factors that layers share in Lily, in stock training either.
CASES = {engine: "ShadowConfig" if engine == "fsdp2" else "LilyConfig" for engine in ENGINES}


@pytest.mark.slow
@pytest.mark.parametrize("engine", CASES)
def test_an_adapter_that_mixes_tokens_stops_all_ranks(tmp_path, workers, engine):
    settings, environment = on_engine(engine, {"adapter": CASES[engine]})
    run = workers.run(tmp_path, settings, world_size=2, environment=environment)
    assert_engine(run, engine)
    assert CASES[engine] in run.refused
    assert run.loss == []
