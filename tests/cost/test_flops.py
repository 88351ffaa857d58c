"""Counted work against brute force: every pair of a tree and of its samples, one by one."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from trl_singlepass.cost import ModelShape, npass_cost, single_pass_cost
from trl_singlepass.cost.flops import GATED_DELTA_CHUNK
from trl_singlepass.reference.timing import Sizes, conversation
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.sample import Sample


SHAPE = ModelShape(matrix_parameters=7, attention_width=3, head_parameters=5, windows=(None, 2, None))
ONE_LAYER = ModelShape(matrix_parameters=1, attention_width=1, head_parameters=1, windows=(None,))
sequences = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=5)


def sample(token_ids):
    return Sample.from_prompt_and_completion(token_ids[:1], token_ids[1:])


def pairs_by_brute_force(subtree_end, position_ids, window):
    return sum(
        j <= i < subtree_end[j] and (window is None or position_ids[i] - position_ids[j] < window)
        for i in range(len(subtree_end))
        for j in range(len(subtree_end))
    )


@given(sequences)
def test_pairs_of_a_tree_are_those_that_its_mask_allows(sequences):
    tree = PrefixTree.from_samples([sample(ids) for ids in sequences])
    cost = single_pass_cost([tree], SHAPE)
    expected = sum(pairs_by_brute_force(tree.subtree_end, tree.position_ids, window) for window in SHAPE.windows)
    assert (cost.tokens, cost.attention_pairs) == (len(tree), expected)


@given(sequences)
def test_npass_costs_the_sum_of_its_samples(sequences):
    samples = [sample(ids) for ids in sequences]
    chains = [PrefixTree.from_samples([one]) for one in samples]
    assert npass_cost(samples, SHAPE) == single_pass_cost(chains, SHAPE)


@given(sequences)
def test_a_single_pass_never_costs_more_than_npass_where_nothing_forks_early(sequences):
    # One trained target per position: no token is stored twice, so the tree holds a subset of the samples' tokens.
    samples = [Sample.from_prompt_and_completion(ids, []) for ids in sequences]
    tree = single_pass_cost([PrefixTree.from_samples(samples)], SHAPE)
    assert tree.flops <= npass_cost(samples, SHAPE).flops


def test_flops_are_three_times_the_forward_pass():
    cost = npass_cost([sample([1, 2, 3])], SHAPE)
    assert cost.attention_pairs == 6 + 5 + 6
    assert cost.targets == 2
    assert cost.flops == 3 * (2 * 7 * 3 + 4 * 3 * 17 + 2 * 5 * 2)


def test_matrix_parameters_are_those_of_the_model():
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=8,
        use_sliding_window=True,
        tie_word_embeddings=False,
    )
    shape = ModelShape.from_config(config)
    parameters = dict(Qwen3ForCausalLM(config).named_parameters())
    matrices = [weight for name, weight in parameters.items() if name.startswith("model.layers") and weight.ndim == 2]
    assert shape.matrix_parameters == sum(weight.numel() for weight in matrices)
    assert shape.head_parameters == parameters["lm_head.weight"].numel()
    assert shape.windows == (None, 8)


def test_a_token_pays_for_the_experts_that_it_visits():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixture = Qwen3MoeConfig(**sizes, head_dim=8, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=24)
    dense = Qwen3Config(**sizes, head_dim=8, intermediate_size=2 * 24)
    router = 32 * 16
    expected = ModelShape.from_config(dense).matrix_parameters + router
    assert ModelShape.from_config(mixture).matrix_parameters == expected


SMALL = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32,
}  # fmt: skip


def operations_that_pytorch_counts(model, num_tokens):
    """By operator, of one forward of the decoder."""
    with FlopCounterMode(display=False) as counter:
        model.model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
    return Counter({str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()})


def test_gpt_oss_costs_what_pytorch_counts():
    config = GptOssConfig(**SMALL, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager")
    shape, length = ModelShape.from_config(config), 32
    # PyTorch computes all pairs, and masks them then.
    expected = 2 * shape.matrix_parameters * length + 4 * shape.attention_width * 2 * length**2
    assert operations_that_pytorch_counts(model, length).total() == expected
    assert shape.windows == (16, None)


def test_a_gated_delta_rule_costs_what_pytorch_counts():
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    config = Qwen3_5TextConfig(
        **SMALL, **linear, linear_key_head_dim=16, linear_value_head_dim=24, num_hidden_layers=4
    )
    model = Qwen3_5ForCausalLM._from_config(config, attn_implementation="eager")
    shape, length = ModelShape.from_config(config), 2 * GATED_DELTA_CHUNK
    counted = operations_that_pytorch_counts(model, length)
    num_scans, width = 3, 2 * 2 * 16 + 4 * 24
    convolutions = num_scans * width * config.linear_conv_kernel_dim
    assert counted["aten.mm"] == 2 * (shape.matrix_parameters - convolutions) * length
    # PyTorch counts no triangular systems; it pads the convolution by 3 tokens.
    systems = num_scans * 4 * GATED_DELTA_CHUNK * (16 + 24)
    assert counted["aten.bmm"] == (shape.scan_flops - systems) * length + 4 * shape.attention_width * length**2
    assert counted["aten.convolution"] == 2 * convolutions * (length + 3)
    assert counted.keys() == {"aten.mm", "aten.bmm", "aten.convolution"}
    assert shape.windows == (None,)


DOCS = (Path(__file__).parents[2] / "docs" / "how_it_works.md").read_text()
ROWS = re.findall(r"^\| \w[\w ]*: `u` (\d+).*?`t` (\d+), `a` (\d+) \|(.*)\|$", DOCS, re.MULTILINE)


def costs_of(turns, user, reasoning, answer):
    sizes = Sizes((user, user), (reasoning, reasoning), (answer, answer), system=0)
    samples = conversation(turns, 30_000, seed=0, sizes=sizes)
    return npass_cost(samples, ONE_LAYER), single_pass_cost([PrefixTree.from_samples(samples)], ONE_LAYER)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"t={row[1]}")
def test_the_docs_tell_the_sharing_factors_of_trees(row):
    user, reasoning, answer = map(int, row[:3])
    for turns, told in zip((2, 4, 8, 16, 32), map(float, row[3].split("|")), strict=True):
        npass, single = costs_of(turns, user, reasoning, answer)
        assert single.tokens == turns * (user + reasoning + 2 * answer) - answer
        assert npass.tokens == turns * (user + reasoning + answer) + (user + answer) * turns * (turns - 1) // 2
        assert told == round(npass.tokens / single.tokens, 2)
    assert len(ROWS) == 3
