"""`torch_compile=True` and kernels that replace a model's layers: the tree still reaches every attention layer."""

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3

from support.float64_comparison import assert_equal_to_npass, single_pass_loss
from support.sample_sets import reasoning_chat
from support.tiny_models import tiny_model
from trl_singlepass.engine.enable import enable_tree


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch's own code
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_compiled_model_trains_the_same(family):
    torch.compiler.reset()
    plain, compiled = (tiny_model(family, dtype=torch.float32, attn_implementation="eager") for _ in range(2))
    for model in (plain, compiled):
        enable_tree(model)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager")
    stats = torch._dynamo.utils.counters["stats"]
    for turns in (3, 4, 5, 6, 7):
        losses = [single_pass_loss(model, [reasoning_chat(turns)]) for model in (plain, compiled)]
        for model, loss in zip((plain, compiled), losses, strict=True):
            model.zero_grad()
            loss.backward()
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=0)
        if turns == 4:  # compiled for the first length, then for all
            graphs = stats["unique_graphs"]
    assert stats["unique_graphs"] == graphs
    torch.compiler.reset()


@pytest.mark.usefixtures("float64")
def test_replaced_layer_functions_leave_attention_alone(monkeypatch):
    """What Liger and `use_kernels=True` do: other code for norms, rotary embeddings and MLPs of the same meaning."""
    called = set()

    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        called.add("rotary")
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(x * cos + modeling_qwen3.rotate_half(x) * sin for x in (q, k))

    def norm(self, hidden_states):
        called.add("norm")
        scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", rotate)
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", norm)
    assert_equal_to_npass(tiny_model("qwen3"), [reasoning_chat()])
    assert called == {"rotary", "norm"}
