"""Layers that draw random numbers, where the tokens of a batch run more than once."""

import pytest
from accelerate import Accelerator
from torch import nn

from support.tiny_families import tiny_model
from trl_singlepass import SinglePassDPOConfig, SinglePassSFTConfig
from trl_singlepass.preference.parts import check_parts
from trl_singlepass.training.waves import check_waves


DROPOUTS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
CHECKS = {
    "waves": (check_waves, SinglePassSFTConfig, "wave_tokens"),
    "waves of pairs": (check_parts, SinglePassDPOConfig, "wave_tokens"),
    "rows of pairs": (check_parts, SinglePassDPOConfig, "max_row_tokens"),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=lambda kind: kind.__name__)
def test_every_kind_of_dropout_is_refused_by_name(tmp_path, dropout, check):
    check, config_class, setting = CHECKS[check]
    args = config_class(str(tmp_path), use_cpu=True, bf16=False, **{setting: 99})
    model = tiny_model("llama", 100, attn_implementation="sdpa")
    model.model.layers[1].mlp.noise = dropout(0.0)
    check(model, args, Accelerator(cpu=True))
    model.model.layers[1].mlp.noise = dropout(0.1)
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.noise.*{setting}=None"):
        check(model, args, Accelerator(cpu=True))
