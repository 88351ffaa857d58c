"""One process with several GPUs (`device_map="auto"`): layers on the second one get the tree there."""

import pytest
import torch
import transformers

from benchmarks.gpu_counts import scan
from support.gpu_stand_in import H100
from support.hybrids import run_by_kernels
from support.sample_sets import reasoning_chat
from support.tiny_models import tiny_model
from support.trainers import needs_cached_states
from support.tree_masks import mask_of, on_meta, random_inputs, tree_of
from trl_singlepass.attention import flash, flex
from trl_singlepass.attention.context import running_on
from trl_singlepass.attention.kernel_choice import DeviceTraits
from trl_singlepass.attention.sdpa import sdpa_forward
from trl_singlepass.attention.varlen_kernels import TorchFlash


FORWARDS = {"sdpa": sdpa_forward, "flex_attention": flex.flex_forward, "flash": flash.varlen_forward("any/flash")}


@pytest.fixture
def _kernels(monkeypatch):
    """Kernels that run on meta tensors; of FlexAttention, the shapes alone."""
    monkeypatch.setattr(DeviceTraits, "from_device", classmethod(lambda cls, device: H100))
    monkeypatch.setattr(flash, "flash_kernel", lambda implementation: TorchFlash())

    def attend(query, key, value, *, block_mask, **options):
        position = torch.zeros(1, dtype=torch.long, device=query.device)
        assert block_mask.mask_mod(position, position, position, position).device == query.device
        return query

    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: attend)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("kind", ["causal", "window", "chunk"])
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_attention_reads_nothing_of_another_device(forward, kind):
    tree = tree_of([reasoning_chat()])
    mask, inputs = mask_of(tree, kind, 5), on_meta(random_inputs(tree, dtype=torch.bfloat16))
    layer = tiny_model("llama4" if kind == "chunk" else "qwen3").model.layers[0].self_attn
    layer.attn_temperature_tuning = True
    layer.use_rope, layer.floor_scale, layer.attn_scale = False, 4, 0.1
    out, _ = forward(layer, inputs.query, inputs.key, inputs.value, mask)
    out.backward(torch.empty_like(out))
    assert out.device == inputs.query.grad.device == torch.device("meta")


@needs_cached_states
def test_recurrent_layers_read_nothing_of_another_device(monkeypatch):
    module = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", scan)
    with torch.device("meta"):
        layer = module.Qwen3_5GatedDeltaNet(transformers.Qwen3_5TextConfig(), 0).train()
    run_by_kernels(layer, monkeypatch)
    tree = tree_of([reasoning_chat()])
    assert tree.depth.device.type == "cpu"
    x = torch.empty(1, tree.plan.length, layer.hidden_size, device="meta", requires_grad=True)
    with running_on(tree):
        out = layer(hidden_states=x)
    out.backward(torch.empty_like(out))
    assert out.device == x.grad.device == torch.device("meta")
