"""`sdpa` and `eager` as a GPU would run them in half precision, computed in float64 by stand-ins for its kernels."""

import itertools

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from support.float64_comparison import CHECKPOINTING, assert_equal_to_npass
from support.gpu_stand_in import H100
from support.sample_sets import reasoning_chat
from support.tiny_models import CUT_OFF, FAMILIES, MIXTURES, tiny_model
from support.varlen_reference import ReferenceKernel
from trl_singlepass.attention import flex, sdpa
from trl_singlepass.attention.kernel_choice import choose_torch_kernel
from trl_singlepass.engine.enable import enable_tree


pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture
def chosen(monkeypatch):
    """The choice for an H100 in bfloat16, whatever the tensors are; returns the list of what was chosen."""
    chosen = []

    def choose(device, dtype, head_dim, rule, **needs):
        chosen.append(choose_torch_kernel(H100, torch.bfloat16, 64, rule, **needs))
        return chosen[-1]

    monkeypatch.setattr(sdpa, "choose_torch_kernel", choose)
    monkeypatch.setattr(sdpa, "TorchFlash", ReferenceKernel)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: torch_flex.flex_attention)
    return chosen


# Not captured, PyTorch 2.13 returns garbage as gradients of a softcap that is traced under checkpointing's hooks.
CASES = [pair for pair in itertools.product(FAMILIES, CHECKPOINTING) if pair != ("gemma2", "non-reentrant")]


@pytest.mark.parametrize(("family", "checkpointing"), CASES)
def test_training_equals_npass_on_the_kernels_of_a_gpu(family, checkpointing, chosen):
    overrides = CUT_OFF.get(family, {}) if checkpointing == "reentrant" else {}
    model = tiny_model(family, attn_implementation="eager", **overrides)
    assert_equal_to_npass(model, [reasoning_chat()], prepare=CHECKPOINTING[checkpointing])
    assert model.config._attn_implementation == "tree_eager"
    assert set(chosen) == {"flex" if family == "gemma2" else "varlen"}


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
