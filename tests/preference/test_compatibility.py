"""What preference pairs cannot honour: refused by name, with the way out."""

import pytest
from accelerate import Accelerator

from support.tiny_families import tiny_model
from trl_singlepass import SinglePassDPOConfig
from trl_singlepass.preference.parts import check_parts


@pytest.mark.parametrize("setting", ["max_row_tokens", "wave_tokens"])
def test_activations_on_the_cpu_are_refused_where_a_row_runs_twice(tmp_path, setting):
    args = SinglePassDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{setting: 99})
    model = tiny_model("llama", 100)
    check_parts(model, args, Accelerator(cpu=True))
    args.activation_offloading = True
    with pytest.raises(ValueError, match=f"activation_offloading does not work with {setting}: .* set {setting}=None"):
        check_parts(model, args, Accelerator(cpu=True))
