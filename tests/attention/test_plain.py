"""Ordinary batches under a model switched to tree attention: the same logits and tokens as the stock model."""

import pytest
import torch

from support.tiny_families import FAMILIES, MIXTURES, tiny_model
from trl_singlepass.engine.enable import enable_tree


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_batches_run_as_before(family):
    """Generation and plain rows: a padded batch gives the same logits and the same tokens as the stock model."""
    # Generation with router logits fails in transformers itself.
    overrides = {"output_router_logits": False} if family in MIXTURES else {}
    model = tiny_model(family, **overrides).eval()
    input_ids = torch.randint(5, 90, (2, 12))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    kept = attention_mask.bool()
    with torch.no_grad():
        logits = model(**inputs).logits[kept]
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        enable_tree(model)
        torch.testing.assert_close(model(**inputs).logits[kept], logits, rtol=0, atol=1e-10)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)
