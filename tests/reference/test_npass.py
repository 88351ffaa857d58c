"""N-pass: it knows nothing of trees, and a loss needs a trained token."""

import pytest
import torch

from support.sample_sets import reasoning_chat
from support.tiny_models import tiny_model
from trl_singlepass import Sample
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.reference import npass_loss_and_gradients


def model_for(tokenizer, family="qwen3", dtype=torch.float32, **overrides):
    return tiny_model(family, vocab_size=len(tokenizer), dtype=dtype, **overrides)


def test_npass_ignores_tree_attention(tokenizer):
    model = model_for(tokenizer)
    samples = reasoning_chat()
    expected = npass_loss_and_gradients(model, samples)
    enable_tree(model)
    found = npass_loss_and_gradients(model, samples)
    assert model.config._attn_implementation == "tree_eager"
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.num_tokens == sum(map(len, samples))


def test_npass_needs_a_trained_token(tokenizer):
    with pytest.raises(ValueError, match="no token of the samples has a weight above 0"):
        npass_loss_and_gradients(model_for(tokenizer), [Sample([1, 2], [0, 0], 1)])
