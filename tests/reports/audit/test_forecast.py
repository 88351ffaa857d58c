"""The forecast: what each schedule computes, with its interval, and what other recipes would train."""

import numpy as np
import pytest
from hypothesis import given
from transformers import Qwen3Config

from support.chat_tokenizers import make_tokenizer
from support.conversations import agentic_chat, chat, plain_chat, tool_chat
from support.sample_sets import sample_sets
from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.audit import audit
from trl_singlepass.reports.audit.forecast import (
    Schedule,
    count_conversation,
    estimate_ratio,
    maximal_chains,
)
from trl_singlepass.trees.image_features import ImageReference
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.radix import SampleMerger
from trl_singlepass.trees.sample import Sample
from trl_singlepass.trees.shared_array import SharedArray


CONFIG = Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize(("template", "leaves"), [("qwen3", 3), ("glm4moe", 3), ("gptoss", 3), ("qwen3_8", 1)])
def test_leaves_of_an_agentic_chat(template, leaves):
    report = audit([agentic_chat()], make_tokenizer(template))
    assert (report.num_chains, report.all_turns.turns) == (leaves, 9)


def test_forecast_counts_what_each_schedule_computes():
    tokenizer, rows = make_tokenizer(), [chat(2), chat(3, 1), tool_chat()]
    samples = [render_example({"messages": row}, tokenizer) for row in rows]
    report, shape = audit(rows, tokenizer, CONFIG).forecast, ModelShape.from_config(CONFIG)
    trees = [PrefixTree.from_samples(turns) for turns in samples]
    assert report.costs[Schedule.NPASS] == npass_cost([s for turns in samples for s in turns], shape)
    assert report.costs[Schedule.SINGLE_PASS] == single_pass_cost(trees, shape)
    assert report.costs[Schedule.SHARED] == single_pass_cost(
        [PrefixTree.from_samples([sample for turns in samples for sample in turns])], shape
    )
    assert report.over_npass.value == report.costs[Schedule.NPASS].flops / report.costs[Schedule.SINGLE_PASS].flops
    assert (
        report.costs[Schedule.NPASS].tokens
        > report.costs[Schedule.CHAINS].tokens
        > report.costs[Schedule.SINGLE_PASS].tokens
    )


def test_without_a_model_the_forecast_counts_tokens_and_pairs():
    report = audit([chat(3)], make_tokenizer())
    assert not report.forecast.has_model
    assert report.forecast.over_npass.value == report.forecast.sharing_factor.value
    assert "of the tokens" in report.verdict
    assert report.forecast.costs[Schedule.NPASS].attention_pairs == sum(
        len(s) * (len(s) + 1) // 2 for s in render_example({"messages": chat(3)}, make_tokenizer())
    )


def chains_of(samples):
    merger = SampleMerger()
    for index, sample in enumerate(samples):
        merger.add(sample, index)
    return list(maximal_chains(samples, merger.finish()))


def chains_by_comparing_all_pairs(samples):
    """For each longest sample, its tokens, and the loss weights of all samples that begin it and no longer one."""
    chains = []
    for sample in sorted(samples, key=len, reverse=True):
        tokens, weights = sample.token_ids.tolist(), sample.loss_weights.tolist()
        found = next((weights for longer, weights in chains if longer[: len(tokens)] == tokens), None)
        if found is None:
            chains.append((tokens, weights))
            continue
        found[: len(weights)] = [a + b for a, b in zip(found, weights, strict=False)]
    return chains


@given(sample_sets(max_samples=9, max_length=12))
def test_chains_are_those_of_comparing_all_pairs(samples):
    chains = [(chain.token_ids.tolist(), chain.loss_weights.tolist()) for chain in chains_of(samples)]
    assert chains == chains_by_comparing_all_pairs(samples)


def test_samples_that_show_different_images_are_different_chains():
    images = ImageReference("a", 1), ImageReference("b", 1)
    samples = [
        Sample(
            [5, 9, 6][: 3 - index],
            [0, 0, 1][: 3 - index],
            2,
            image_features=[-1, index, -1][: 3 - index],
            images=images,
        )
        for index in range(2)
    ]
    assert [len(chain) for chain in chains_of(samples)] == [3, 2]


@pytest.mark.parametrize("template", ["qwen3", "qwen3_8"])
def test_the_work_of_counting_grows_with_the_turns(template, monkeypatch):
    """Counted, since a clock is not reliable: every read walks over the arrays that the samples share."""
    reads, read = [], SharedArray.tail

    def counted(array, start):
        reads.append(start)
        return read(array, start)

    tokenizer, shape = make_tokenizer(template), ModelShape.from_config(CONFIG)
    few, many = (render_example({"messages": chat(turns)}, tokenizer) for turns in (8, 32))
    monkeypatch.setattr(SharedArray, "tail", counted)
    count_conversation(few, shape)
    reads_of_few = len(reads)
    count_conversation(many, shape)
    assert len(reads) - reads_of_few <= 4 * reads_of_few


def test_ratio_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    bottom = rng.uniform(1, 3, 2000)
    top = 2 * bottom + rng.normal(0, 1, 2000)
    truth, covered = top.sum() / bottom.sum(), 0
    for _ in range(300):
        drawn = rng.permutation(2000)[:100]
        estimate = estimate_ratio(top[drawn], bottom[drawn], 100 / 2000)
        covered += estimate.low <= truth <= estimate.high
    assert 0.91 <= covered / 300 <= 0.99


def test_other_recipes():
    report = audit([chat(4)], make_tokenizer())
    by_name = {recipe.name: recipe for recipe in report.recipes}
    swapped, last = by_name["TRL assistant_only_loss"], by_name["last turn only"]
    samples = render_example({"messages": chat(4)}, make_tokenizer())
    # TRL's training template for Qwen3 keeps all reasoning: it is trained, but in contexts that inference never shows.
    assert swapped.reasoning_not_trained == 0
    first = len(samples[0]) - samples[0].prompt_length
    assert 0 < swapped.trained_tokens - swapped.unlike_inference <= first
    assert last.reasoning_not_trained == sum(sample.reasoning_length for sample in samples[:-1])
    assert (last.unlike_inference, last.trained_tokens) == (0, len(samples[-1]) - samples[-1].prompt_length)


def test_recipes_whose_template_strips_lose_the_reasoning_of_earlier_turns():
    report = audit([chat(4)], make_tokenizer("glm4moe"))
    samples = render_example({"messages": chat(4)}, make_tokenizer("glm4moe"))
    recipe = next(recipe for recipe in report.recipes if recipe.name == "TRL assistant_only_loss")
    assert recipe.reasoning_not_trained == sum(sample.reasoning_length for sample in samples[:-1])
    assert any("would not train" in finding for finding in report.findings)


def test_prompt_and_completion_rows_are_audited_on_the_completion():
    messages = chat(2)
    report = audit([{"prompt": messages[:-1], "completion": messages[-1:]}], make_tokenizer())
    assert report.all_turns.turns == 1
    recipe = next(recipe for recipe in report.recipes if recipe.name == "TRL assistant_only_loss")
    assert recipe.trained_tokens <= recipe.completion_tokens + 8  # nothing of the prompt's own assistant message


@pytest.mark.parametrize(("template", "turns"), [("qwen3", 3), ("qwen3_8", 3), ("glm4moe", 1)])
def test_trls_default_trains_all_tokens_of_one_sequence(template, turns):
    tokenizer, messages = make_tokenizer(template), chat(turns)
    report = audit([messages], tokenizer)
    recipe = next(recipe for recipe in report.recipes if recipe.name == "TRL's SFTTrainer")
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    samples = render_example({"messages": messages}, tokenizer)
    assert recipe.trained_tokens == len(whole) - 1
    exact = {
        tuple(sample.token_ids[: position + 1].tolist())
        for sample in samples
        for position in range(sample.prompt_length, len(sample))
    }
    written = sum(tuple(whole[: position + 1]) in exact for position in range(1, len(whole)))
    assert recipe.unlike_inference == recipe.trained_tokens - written
    lost = sum(sample.reasoning_length for sample in samples[:-1])
    assert recipe.reasoning_not_trained == (0 if template == "qwen3_8" else lost)


def test_each_finding_says_what_to_do():
    for template in ("qwen3", "glm4moe", "gptoss", "deepseek_r1_distill"):
        findings = audit([chat(3), plain_chat(2)], make_tokenizer(template), max_length=40).findings
        assert findings
        assert all(finding.count(". ") >= 1 for finding in findings if "cannot be used" not in finding), findings
