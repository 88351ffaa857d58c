"""The survey of adapters: what `docs/adapters.md` lists as exact is exact, and nothing is accepted and wrong."""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version

from support.adapters import (
    ADAPTERS,
    FAMILIES,
    INVOCATION,
    PAGE,
    STATUSES,
    adapted,
    away_from_start,
    compare_in_float64,
    draws_random_numbers,
    of,
    peft,
    read_page,
    survey,
    surveyed_types,
    write_page,
)
from support.conversations import chat
from support.planted_layers import plant, qwen3_model
from support.slow import slow_but_for
from support.tiny_models import tiny_model
from support.trainers import float32_model, largest_difference, parameters, single_pass_trainer, train_both
from support.tree_checks import PRECISIONS, TEXT, checked
from trl_singlepass import SinglePassDPOConfig, SinglePassSFTConfig
from trl_singlepass.engine.check.checked_model import TreeCheckError
from trl_singlepass.training import refusals
from trl_singlepass.training.situation import Situation


WRITES = os.environ.get("WRITE_ADAPTERS_PAGE") == "1"
TOLERANCE = 1e-6
IS_OF_PAGE = Version(peft.__version__).release[:2] == Version(read_page()[0]).release[:2]
# Those that most people train with, and one of each kind of layer.
COMMON = ["LoraConfig", "LoraConfig(use_dora=True)", "IA3Config", "VeraConfig", "OFTConfig"]
REFUSED = ["LoraConfig(alora_invocation_tokens=…)", "PromptTuningConfig", "ShadowConfig"]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of adapters that start in unusual ways
    pytest.mark.skipif(not IS_OF_PAGE, reason="other releases of PEFT have other adapters and options"),
]


def skip_without_packages(label):
    if label == "AdamssConfig":
        pytest.importorskip("sklearn")


@pytest.fixture(scope="session")
def found():
    """Collect outcomes; with `WRITE_ADAPTERS_PAGE=1` and all rows run, the page is written from them."""
    outcomes = {}
    yield outcomes
    if WRITES and len(outcomes) == len(ADAPTERS):
        write_page({label: outcomes[label] for label in ADAPTERS})


def test_every_tuner_type_is_in_the_table():
    assert surveyed_types() == set(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)


@pytest.mark.parametrize("label", slow_but_for([*COMMON, *REFUSED], ADAPTERS))
def test_adapter_is_what_the_page_says(label, found):
    skip_without_packages(label)
    found[label] = survey(label)
    if not WRITES:
        assert found[label] == read_page()[1].get(label), (
            f"{PAGE.name} is out of date: run this file with WRITE_ADAPTERS_PAGE=1"
        )


def test_page_has_known_statuses_and_a_reason_for_each_refusal():
    _, page = read_page()
    assert set(page) == set(ADAPTERS)
    assert {outcome.status for outcome in page.values()} == set(STATUSES)
    assert all(outcome.remark for outcome in page.values() if outcome.status == "refused")


# Trainers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label",
    slow_but_for(COMMON, ADAPTERS),
)
def test_trainers_move_an_adapter_as_stock_or_refuse_it(tmp_path, tokenizer, label):
    skip_without_packages(label)
    model = away_from_start(adapted(label, float32_model(tokenizer, FAMILIES.get(label, "qwen3"))))
    outcome = read_page()[1][label]
    if outcome.status == "refused":
        kind = TreeCheckError if outcome.remark.startswith("measured") else ValueError
        with pytest.raises(kind) as error:
            single_pass_trainer(tmp_path, tokenizer, [chat(3)], model).train()
        assert any(name in str(error.value) for name in re.findall(r"\w+(?=[(=]|$)", label))
        return
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    both = train_both(tmp_path, tokenizer, model)
    moved = max(float((parameter - start[name]).abs().max()) for name, parameter in parameters(both[1]).items())
    assert moved > 100 * TOLERANCE
    if not draws_random_numbers(model):
        assert largest_difference(*both) <= TOLERANCE


# What is refused, and why it must be ---------------------------------------------------------------------------------


def text_with(tokens):
    """Return a text that holds given tokens several times."""
    text = TEXT.copy()
    for place in (1, 13, 25, 40, 66):
        text[place : place + len(tokens)] = tokens
    return text


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_check_finds_alora_where_its_tokens_are(precision):
    """Its parameters have no effect yet; where none of the tokens is in the row, no measurement can see it."""
    label = "LoraConfig(alora_invocation_tokens=…)"
    report = checked(adapted(label, qwen3_model()), precision, text_with(INVOCATION))
    assert not report.ok
    if precision == torch.float32:
        assert "q_proj (Linear)" in report.where
    assert report.adapters == "LoraConfig"
    assert checked(adapted(label, qwen3_model()), precision, TEXT[~np.isin(TEXT, INVOCATION)]).ok


@pytest.mark.parametrize("label", ["LilyConfig", "ShadowConfig"])
def test_the_check_names_adapters_and_leaves_them_as_they_were(label):
    model = adapted(label)
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert checked(model).adapters == label
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not frozen.requires_grad


def test_adapters_are_not_blamed_for_their_model():
    model = adapted("LoraConfig", plant(qwen3_model(), "TokenShift")[0])
    report = checked(model)
    assert not report.ok
    assert report.adapters is None


@pytest.mark.parametrize("label", ["XLoraConfig", "PeftMixedModel"])
def test_what_only_trainers_cannot_serve_is_exact_in_a_loop_of_ones_own(label):
    model = away_from_start(adapted(label))
    with pytest.raises(ValueError, match=label):
        refusals.check(Situation(SimpleNamespace(wave_tokens=None), model), refusals.ADAPTERS)
    assert checked(model).ok
    compare_in_float64(model.double())


@pytest.mark.parametrize("config", [SinglePassSFTConfig, SinglePassDPOConfig])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PveraConfig", {}),
        ("LoHaConfig", {"rank_dropout": 0.1}),
        ("LoKrConfig", {"module_dropout": 0.1}),
        ("OFTConfig", {"module_dropout": 0.1, "oft_block_size": 4}),
        ("BOFTConfig", {"boft_dropout": 0.1, "boft_block_size": 4}),
        ("LoraConfig", {"monteclora_config": True}),
    ],
)
def test_what_draws_random_numbers_is_refused_where_tokens_run_twice(tmp_path, tokenizer, name, options, config):
    if "monteclora_config" in options:
        options = {"monteclora_config": peft.tuners.lora.config.MontecloraConfig(buffer_size=2)}
    model = of(name, target_modules=["q_proj"], **options)(float32_model(tokenizer))
    args = config(str(tmp_path), use_cpu=True, bf16=False, wave_tokens=99)
    with pytest.raises(ValueError, match=name):
        refusals.check_parts(Situation(args, model))
    refusals.check_parts(Situation(args, of("LoraConfig", target_modules=["q_proj"])(float32_model(tokenizer))))


@pytest.mark.slow
@pytest.mark.parametrize("label", ADAPTERS)
def test_no_false_alarm_in_half_precision(label):
    skip_without_packages(label)
    outcome = read_page()[1][label]
    if outcome.status == "refused":
        pytest.skip("refused")
    report = checked(adapted(label, tiny_model(FAMILIES.get(label, "qwen3"), dtype=torch.bfloat16)))
    assert report.ok, report.reason
