"""What layers ask for and a tree cannot honour is refused; dtypes under autocast are those of stock SDPA."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from support.float64_comparison import forward
from support.sample_sets import reasoning_chat
from support.tree_masks import mask_of, tree_of
from trl_singlepass.attention.interface import AttentionInputs, check_layer
from trl_singlepass.engine.enable import enable_tree


def test_attention_dropout_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.1))
    enable_tree(model.train())
    with pytest.raises(ValueError, match=r"GPT2Attention asks for attention dropout 0\.1.*attention_dropout"):
        forward(model, [reasoning_chat()])


@pytest.mark.parametrize("shape", [(1, 4, 3, 8), (2, 4, None, 8)])
def test_a_batch_that_is_not_the_row_of_the_tree_is_refused(shape):
    mask = mask_of(tree_of([reasoning_chat()]), "causal", 0)
    query = torch.zeros([mask.tree.plan.length if size is None else size for size in shape])
    with pytest.raises(ValueError, match=rf"Linear got {shape[0]} rows of {query.shape[2]} tokens on a tree of"):
        check_layer(torch.nn.Linear(1, 1), mask, query, 0.0, {})


def test_a_position_bias_is_refused():
    mask = mask_of(tree_of([reasoning_chat()]), "causal", 0)
    query = torch.zeros(1, 4, mask.tree.plan.length, 8)
    with pytest.raises(ValueError, match="adds a position bias"):
        check_layer(torch.nn.Linear(1, 1), mask, query, 0.0, {"position_bias": query})


@pytest.mark.parametrize(
    ("dtypes", "autocast", "common"),
    [
        ((torch.float32, torch.float32, torch.bfloat16), True, torch.bfloat16),
        ((torch.float32, torch.float32, torch.bfloat16), False, torch.float32),
        ((torch.float64, torch.float64, torch.float64), True, torch.float64),
    ],
)
def test_common_dtype(dtypes, autocast, common):
    inputs = AttentionInputs(*(torch.zeros(1, 1, 2, 8, dtype=dtype) for dtype in dtypes), 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        inputs = inputs.to_common_dtype()
    assert {inputs.query.dtype, inputs.key.dtype, inputs.value.dtype} == {common}
