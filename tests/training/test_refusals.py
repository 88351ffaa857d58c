"""The table of refusals: each can be met, names its setting, and stands in `docs/limits.md`."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import AdaptionPromptConfig, LoraConfig, OFTConfig, PolyConfig, PromptTuningConfig, VeloraConfig, XLoraConfig
from peft import get_peft_model as with_adapter
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.hybrid_step import small_hybrid
from support.conversations import chat
from support.image_models import image_model
from support.pairs import pair
from support.tiny_models import model_of_type, tiny_model
from support.trainers import dpo_trainer, single_pass_trainer
from trl_singlepass import SinglePassAsyncGRPOConfig, SinglePassDPOConfig, SinglePassGRPOConfig, SinglePassSFTConfig
from trl_singlepass.attention.registry import TREE_ATTENTION
from trl_singlepass.training.refusals import (
    ADAPTERS,
    ASYNC,
    CONVERSATIONS,
    ENGINES,
    GROUPS,
    IMAGES,
    OLDER_TRL,
    PACKAGES,
    PAIRS,
    PARTS,
    SCOPES,
    TENSOR_PARALLELISM,
    TURNS,
    ULYSSES,
    WAVES,
    WEIGHTS,
    Refusal,
    as_markdown,
    check,
    check_parts,
)
from trl_singlepass.training.situation import Situation


pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # deprecations of settings that are refused
PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
PRINTED = re.compile(r"(?<=<!-- refusals: begin -->\n\n).*?(?=\n\n<!-- refusals: end -->)", re.DOTALL)
OLD = {"trl.__version__": "1.14.0"}
TWO = {"WORLD_SIZE": "2"}
NO_PACKAGES = {
    f"trl_singlepass.training.{name}": lambda: False
    for name in (
        "situation.is_flash_attn_2_available",
        "situation.is_kernels_available",
        "refusals.is_liger_kernel_available",
    )
}


def groups(settings=None, **known):
    return lambda: Situation(SinglePassGRPOConfig("unused", use_cpu=True, bf16=False, **settings or {}), **known)


def of_async(settings=None, **known):
    options = {"use_cpu": True, "bf16": False, **(settings or {})}
    return lambda: Situation(SinglePassAsyncGRPOConfig("unused", **options), **known)


def sft(settings=None, **known):
    return lambda: Situation(SinglePassSFTConfig("unused", use_cpu=True, bf16=False, **settings or {}), **known)


def pairs(settings=None, **known):
    return lambda: Situation(SinglePassDPOConfig("unused", use_cpu=True, bf16=False, **settings or {}), **known)


def with_model(make, settings=None, **known):
    """As `sft`, with a model that is only made when the case runs."""
    return lambda: Situation(sft(settings)().args, make(), **known)


def llama(**options):
    return tiny_model("llama", 100, **options)


def configured(model=None, **settings):
    model = model or llama()
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def divided_by_transformers():
    model = llama()
    model._is_distributed_loading_by_transformers = True  # as `from_pretrained(distributed_config=…)` does
    return model


def with_dropout(dropout):
    model = llama()
    model.model.layers[1].mlp.noise = dropout
    return model


def on(kind=DistributedType.NO, device="cpu", sizes=None, **deepspeed):
    """Return what the table reads of an accelerator."""
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config=deepspeed) if kind == DistributedType.DEEPSPEED else None
    return SimpleNamespace(
        distributed_type=kind,
        device=torch.device(device),
        is_fsdp2=False,
        parallelism_config=SimpleNamespace(**sizes) if sizes else None,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )


def a_loss(*_):
    raise NotImplementedError


DEEPSPEED = on(DistributedType.DEEPSPEED)
LORA = {"target_modules": ["q_proj"]}
# For each refusal of a scope, in its order: words of the error, the least that is refused, what is patched for it.
CASES = {
    TURNS: [
        ("truncation_mode='keep_end'", pairs({"max_length": 9, "truncation_mode": "keep_end"})),
        ("dispatch_batches", sft({"accelerator_config": {"dispatch_batches": True}})),
        ("include_for_metrics=['inputs']", sft({"include_for_metrics": ["inputs"]})),
        ("neftune_noise_alpha", sft({"neftune_noise_alpha": 5.0})),
    ],
    CONVERSATIONS: [
        ("completion_only_loss=False", sft({"completion_only_loss": False})),
        ("assistant_only_loss=False", sft({"assistant_only_loss": False})),
        ("packing_strategy='wrapped'", sft({"packing_strategy": "wrapped"}, packing=True)),
        ("skip_prepare_dataset", sft({"dataset_kwargs": {"skip_prepare_dataset": True}})),
        ("compute_loss_func", sft(compute_loss_func=a_loss)),
    ],
    PAIRS: [
        ("trl 1.14.0", pairs(), OLD),
        ("packing=False", pairs({"packing": False})),
        ("loss_type=['ipo'] with turn_mean", pairs({"loss_type": "ipo", "turn_mean": True})),
        ("use_weighting=True with turn_discount", pairs({"use_weighting": True, "turn_discount": 0.5})),
        ("ld_alpha=0.5 with turn_mean", pairs({"ld_alpha": 0.5, "turn_mean": True})),
        ("tp_size=2", pairs(tp_size=2)),
        ("sp_size=2", pairs(accelerator=on(sizes={"sp_size": 2}))),
    ],
    GROUPS: [
        ("trl 1.14.0", groups(), OLD),
        ("neftune_noise_alpha", groups({"neftune_noise_alpha": 5.0})),
        ("tp_size=2", groups(tp_size=2)),
        ("sp_size=2", groups(accelerator=on(sizes={"sp_size": 2}))),
    ],
    ASYNC: [
        ("fork_threshold_tokens=512", of_async({"fork_threshold_tokens": 512})),
        ("max_row_tokens", of_async({"max_row_tokens": 64})),
        ("deepspeed", of_async(accelerator=on(DistributedType.DEEPSPEED))),
        ("tp_size=2", of_async(tp_size=2)),
        ("sp_size=2", of_async(accelerator=on(sizes={"sp_size": 2}))),
    ],
    WEIGHTS: [
        ("trl 1.14.0", sft(), OLD),
        ("loss_type='dft'", sft({"loss_type": "dft"})),
        ("label_smoothing_factor", sft({"label_smoothing_factor": 0.1})),
        ("compute_loss_func", sft(compute_loss_func=a_loss)),
    ],
    OLDER_TRL: [
        ("LlamaForCausalLM", with_model(llama, accepts_loss_kwargs=False), OLD),
        ("log_turn_metrics=True", sft({"log_turn_metrics": True}), OLD),
    ],
    ADAPTERS: [
        ("PeftMixedModel", with_model(lambda: with_adapter(llama(), LoraConfig(**LORA), mixed=True))),
        ("PromptTuningConfig", sft(peft_config=PromptTuningConfig(num_virtual_tokens=4))),
        ("AdaptionPromptConfig", sft(peft_config=AdaptionPromptConfig(adapter_len=4, adapter_layers=2))),
        ("alora_invocation_tokens", sft(peft_config=LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[2]))),
        ("velora_config", sft(peft_config=LoraConfig(velora_config=VeloraConfig(init_type="batch_average_once")))),
        ("PolyConfig", sft(peft_config=PolyConfig())),
        ("XLoraConfig", sft(peft_config=XLoraConfig(hidden_size=8, adapters={"0": "a"}))),
    ],
    IMAGES: [
        ("wave_tokens", sft({"wave_tokens": "auto"})),
        ("ZeRO-3", with_model(lambda: image_model("qwen3_vl"), {"wave_tokens": 99}, accelerator=DEEPSPEED)),
        ("wave_tokens", pairs({"wave_tokens": 99}, accelerator=on(DistributedType.FSDP))),
        ("sp_size=2", sft(accelerator=on(sizes={"sp_size": 2}))),
        ("tp_size=2", sft(tp_size=2)),
    ],
    WAVES: [
        ("trl 1.14.0", sft({"wave_tokens": 99}), OLD),
        (
            "transformers 5.14.0",
            sft({"wave_tokens": 99, "label_smoothing_factor": 0.1}),
            {"transformers.__version__": "5.14.0"},
        ),
        ("torch_compile", sft({"wave_tokens": 99, "torch_compile": True})),
        (
            "attn_implementation='flex_attention'",
            with_model(lambda: configured(_attn_implementation=TREE_ATTENTION["flex_attention"]), {"wave_tokens": 99}),
        ),
        ("JambaMambaMixer", with_model(lambda: model_of_type("jamba"), {"wave_tokens": "auto"})),
        (
            "Qwen3_5GatedDeltaNet",
            with_model(small_hybrid, {"wave_tokens": "auto"}, accelerator=on(DistributedType.FSDP)),
        ),
    ],
    PARTS: [
        ("activation_offloading", pairs({"max_row_tokens": 99, "activation_offloading": True})),
        ("optim='lomo'", sft({"wave_tokens": 99, "optim": "lomo"})),
        ("Dropout (model.layers.1.mlp.noise)", with_model(lambda: with_dropout(nn.Dropout(0.1)))),
        (
            "OFTConfig(module_dropout=0.1)",
            with_model(lambda: with_adapter(llama(), OFTConfig(**LORA, oft_block_size=4, module_dropout=0.1))),
        ),
        ("router_jitter_noise", with_model(lambda: configured(router_jitter_noise=0.1))),
        ("MEGATRON_LM", sft(accelerator=on(DistributedType.MEGATRON_LM))),
        ("fsdp_version=1", sft(accelerator=on(DistributedType.FSDP))),
        (
            "stage3_prefetch_bucket_size",
            sft(accelerator=on(DistributedType.DEEPSPEED, zero_optimization={"stage3_prefetch_bucket_size": 9})),
        ),
    ],
    ENGINES: [
        ("cp_size=2", sft(accelerator=on(sizes={"cp_size": 2}))),
        ("tp_size=2 with sp_size", sft(accelerator=on(sizes={"tp_size": 2, "sp_size": 2}))),
        ("pp_size=2", with_model(lambda: configured(distributed_config=SimpleNamespace(pp_size=2)))),
        ("deepspeed", lambda: Situation(SimpleNamespace(deepspeed="a.json", fsdp=None, wave_tokens=None), None, on())),
        ("fsdp", sft(accelerator=on(DistributedType.MULTI_CPU)), {**TWO, "ACCELERATE_USE_FSDP": "true"}),
        ("fsdp", sft(accelerator=on(DistributedType.MULTI_GPU, "cuda")), {**TWO, "ACCELERATE_USE_FSDP": "true"}),
        ("autotp_size=2", sft(accelerator=on(DistributedType.DEEPSPEED, tensor_parallel={"autotp_size": 2}))),
        ("ddp_backend", sft(accelerator=on()), TWO),
    ],
    TENSOR_PARALLELISM: [
        (
            "save_strategy='epoch'",
            with_model(divided_by_transformers, {"save_strategy": "epoch"}),
        ),
        ("transformers", with_model(llama, tp_size=2)),
        ("wave_tokens", sft({"wave_tokens": 99}, tp_size=2)),
        (
            "Qwen3_5GatedDeltaNet",
            with_model(lambda: configured(small_hybrid(), distributed_config=SimpleNamespace()), tp_size=2),
        ),
    ],
    ULYSSES: [
        ("FSDP", sft(accelerator=on(DistributedType.FSDP))),
        ("trl 1.14.0", sft(accelerator=DEEPSPEED), OLD),
        ("fp16", lambda: Situation(SimpleNamespace(fp16=True, wave_tokens=None), None, DEEPSPEED)),
        ("num_attention_heads and num_key_value_heads", with_model(lambda: model_of_type("mamba"))),
    ],
    PACKAGES: [
        (
            "attn_implementation='flash_attention_2'",
            sft({"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}),
            NO_PACKAGES,
        ),
        ("use_liger_kernel=True", sft({"use_liger_kernel": True}), NO_PACKAGES),
    ],
}


def test_every_refusal_has_a_case():
    assert {scope.title: len(scope.refusals) for scope in SCOPES} == {s.title: len(c) for s, c in CASES.items()}


@pytest.mark.parametrize(
    ("scope", "refusal", "case"),
    [
        pytest.param(scope, *pair, id=f"{scope.title}: {pair[0].what}")
        for scope, cases in CASES.items()
        for pair in zip(scope.refusals, cases, strict=True)
    ],
)
def test_each_is_refused_by_name(monkeypatch, scope, refusal, case):
    name, build, *patches = case

    def build_and_check():
        run = build()  # pairs are checked here
        for target, value in (patches[0] if patches else {}).items():
            monkeypatch.setenv(target, value) if target.isupper() else monkeypatch.setattr(target, value)
        check(run, scope)

    with pytest.raises(refusal.error, match=re.escape(name)) as caught:
        build_and_check()
    assert refusal.why.replace("`", "") in str(caught.value)


@pytest.mark.parametrize("make", [sft, pairs])
def test_nothing_is_refused_by_default(make):
    run = make(accelerator=on(), dataset=Dataset.from_dict({"messages": []}))()
    others = (PAIRS if make is sft else CONVERSATIONS, ASYNC, ULYSSES)
    check(run, *(scope for scope in SCOPES if scope not in others))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "rows", "settings", "others"),
    [
        (single_pass_trainer, [chat(2)], {"reasoning_weight": 0.5}, (PAIRS, GROUPS, ASYNC, IMAGES, ULYSSES)),
        (
            dpo_trainer,
            [pair(2)],
            {"max_row_tokens": 300},
            # Pairs refuse all of tensor parallelism, and TRL before 1.15.
            (CONVERSATIONS, GROUPS, ASYNC, IMAGES, OLDER_TRL, TENSOR_PARALLELISM, ULYSSES, WEIGHTS),
        ),
    ],
    ids=["conversations", "pairs"],
)
def test_a_run_in_waves_meets_every_refusal_of_its_kind(
    tmp_path, tokenizer, monkeypatch, make, rows, settings, others
):
    met, found = set(), Refusal.found
    monkeypatch.setattr(Refusal, "found", lambda refusal, run: met.add(refusal) or found(refusal, run))
    make(tmp_path, tokenizer, rows, wave_tokens=64, **settings).train()
    assert {scope.title for scope in SCOPES if not met.issuperset(scope.refusals)} == {s.title for s in others}


def test_the_page_lists_what_is_refused():
    text = PAGE.read_text("utf-8")
    if os.environ.get("WRITE_LIMITS_PAGE") == "1":
        PAGE.write_text(PRINTED.sub(lambda _: as_markdown(), text), "utf-8")
        return
    assert PRINTED.search(text).group() == as_markdown(), "run this file with WRITE_LIMITS_PAGE=1"


# What some lines tell apart ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "setting"), [(sft, "wave_tokens"), (pairs, "wave_tokens"), (pairs, "max_row_tokens")]
)
@pytest.mark.parametrize(
    "dropout",
    [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout],
    ids=lambda kind: kind.__name__,
)
def test_every_kind_of_dropout_is_refused_where_rows_run_in_parts(dropout, make, setting):
    args = make({setting: 99})().args
    check_parts(Situation(args, with_dropout(dropout(0.0))))
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.noise.*{setting}=None"):
        check_parts(Situation(args, with_dropout(dropout(0.1))))


@pytest.mark.parametrize(
    ("kind", "prefetched"), [(DistributedType.DEEPSPEED, 0), (DistributedType.MULTI_CPU, 9), (DistributedType.NO, 9)]
)
def test_engines_that_run_rows_in_parts(kind, prefetched):
    engine = on(kind, zero_optimization={"stage3_prefetch_bucket_size": prefetched})
    check(sft({"wave_tokens": 99}, accelerator=engine)(), PARTS)


def test_rows_that_ranks_share_may_have_recurrent_layers():
    check(with_model(lambda: model_of_type("qwen3_5_text"), accelerator=DEEPSPEED)(), ULYSSES)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU])
def test_fsdp_on_a_cpu_says_that_it_needs_a_gpu_whatever_accelerate_chose(monkeypatch, kind):
    """Each setting that an error named led to the next error."""
    run = sft(accelerator=on(kind))()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"fsdp on a CPU .*use_cpu=True"):
        check(run, ENGINES)


@pytest.mark.parametrize(("launched", "kind"), [("1", DistributedType.NO), ("2", DistributedType.MULTI_CPU)])
def test_launches_that_train(monkeypatch, launched, kind):
    run = sft(accelerator=on(kind))()
    monkeypatch.setenv("WORLD_SIZE", launched)
    if launched == "1":  # one process may keep a configuration of FSDP
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check(run, ENGINES)


@pytest.mark.parametrize("settings", [{"save_strategy": "steps", "save_only_model": True}, {"save_strategy": "no"}])
def test_a_divided_model_may_be_saved_without_its_optimizer(settings):
    run = with_model(divided_by_transformers, settings)()
    check(run, TENSOR_PARALLELISM)


def test_a_model_that_takes_the_divisor_of_its_loss_needs_no_newer_trl(monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    check(Situation(sft()().args, model, accepts_loss_kwargs=False), OLDER_TRL)
    monkeypatch.setattr("trl.__version__", "1.14.0")
    check(Situation(sft()().args, model), OLDER_TRL)
