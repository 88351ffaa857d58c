"""The table of refusals: each can be met, names its setting, and stands in `docs/limits.md`."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from torch import nn

from benchmarks.hybrid_step import small_hybrid
from support.tiny_families import tiny_model
from trl_singlepass import SinglePassDPOConfig, SinglePassSFTConfig
from trl_singlepass.training.refusals import REFUSALS, check, check_parts
from trl_singlepass.training.situation import Situation


DROPOUTS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
IN_PARTS = {
    "waves": (SinglePassSFTConfig, "wave_tokens"),
    "waves of pairs": (SinglePassDPOConfig, "wave_tokens"),
    "rows of pairs": (SinglePassDPOConfig, "max_row_tokens"),
}


def configured(config, folder, **settings):
    return config(str(folder), use_cpu=True, bf16=False, **settings)


def on(kind, **deepspeed):
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": deepspeed})
    state = SimpleNamespace(deepspeed_plugin=plugin if kind == DistributedType.DEEPSPEED else None)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=False, parallelism_config=None, state=state)


def refused(situation):
    return [refusal.setting for refusal in REFUSALS if refusal.when(situation)]


@pytest.mark.parametrize("case", IN_PARTS)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=lambda kind: kind.__name__)
def test_every_kind_of_dropout_is_refused_by_name_where_rows_run_in_parts(tmp_path, dropout, case):
    config, setting = IN_PARTS[case]
    args = configured(config, tmp_path, **{setting: 99})
    model = tiny_model("llama", 100, attn_implementation="sdpa")
    model.model.layers[1].mlp.noise = dropout(0.0)
    check_parts(Situation(args, model))
    model.model.layers[1].mlp.noise = dropout(0.1)
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.noise.*{setting}=None"):
        check_parts(Situation(args, model))


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_hybrid_of_which_a_rank_holds_a_shard_is_not_measured(tmp_path, kind):
    args = configured(SinglePassSFTConfig, tmp_path, wave_tokens="auto")
    with pytest.raises(ValueError, match="Set a number of tokens"):
        check_parts(Situation(args, small_hybrid(), on(kind, stage3_prefetch_bucket_size=0)))


def test_engines_that_accumulate_otherwise_are_refused(tmp_path):
    args = configured(SinglePassSFTConfig, tmp_path, wave_tokens=99)

    def refused_on(kind, **settings):
        return refused(Situation(args, accelerator=on(kind, **settings)))

    assert refused_on(DistributedType.MEGATRON_LM) == ["engines other than DDP, DeepSpeed and FSDP2"]
    assert refused_on(DistributedType.FSDP) == ["`fsdp_version=1`"]
    assert refused_on(DistributedType.DEEPSPEED, stage3_prefetch_bucket_size=0) == []
    assert refused_on(DistributedType.DEEPSPEED, stage3_prefetch_bucket_size=9) == [
        "`stage3_prefetch_bucket_size` above 0 of ZeRO-3"
    ]


def test_nothing_is_refused_by_default(tmp_path):
    for config in (SinglePassSFTConfig, SinglePassDPOConfig):
        situation = Situation(configured(config, tmp_path), tiny_model("llama", 100), on(DistributedType.NO))
        check(situation, *{refusal.scope for refusal in REFUSALS})
