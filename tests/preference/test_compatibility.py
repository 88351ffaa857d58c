"""What preference pairs cannot honour: refused by name, with the way out."""

from types import SimpleNamespace

import pytest

from benchmarks.hybrid_step import small_hybrid
from support.trainers import needs_cached_states
from trl_singlepass.preference.compatibility import check_recurrent_layers


@needs_cached_states
def test_recurrent_layers_are_not_sharded_by_zero3():
    plugin = SimpleNamespace(zero_stage=3)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2)
    model = small_hybrid()
    with pytest.raises(ValueError, match="ZeRO-3 does not work with Qwen3_5GatedDeltaNet for pairs"):
        check_recurrent_layers(model, accelerator)
    plugin.zero_stage = 2
    check_recurrent_layers(model, accelerator)
