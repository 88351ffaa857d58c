"""Flash packages: each is called as its release wants to be, and one that is missing is named."""

import itertools
import sys

import pytest
import torch

from support import fake_flash
from support.gpu_stand_in import T4, gpu
from support.sample_sets import reasoning_chat
from support.tree_masks import assert_same, mask_of, output_and_gradients, random_inputs, tree_of
from trl_singlepass.attention import varlen_kernels, varlen_plan
from trl_singlepass.attention.kernel_choice import DeviceTraits
from trl_singlepass.attention.sdpa import torch_tree_attention
from trl_singlepass.attention.varlen import varlen_tree_attention


PACKAGES = {"flash2": fake_flash.flash2, "flash3": fake_flash.flash3, "hub_flash3": fake_flash.hub_flash3}


def kernel_from(monkeypatch, package):
    """The kernel that is made of a package's module, as it is found through transformers."""
    module = PACKAGES[package]()
    monkeypatch.setitem(sys.modules, "fake_package", module)
    module.__name__ = "fake_package"
    found = (None, type("F", (), {"__module__": "fake_package"})())
    monkeypatch.setattr(varlen_kernels, "lazy_import_flash_attention", lambda name: (found, None))
    return varlen_kernels.flash_kernel.__wrapped__("any/flash")


@pytest.mark.parametrize("keys_per_call", [4, 1])
@pytest.mark.parametrize("kind", ["causal", "window", "chunk"])
@pytest.mark.parametrize(("package", "softcap"), [("torch", None), *itertools.product(PACKAGES, [None, 3.0])])
def test_every_package_is_called_right(package, kind, softcap, keys_per_call, monkeypatch):
    monkeypatch.setattr(varlen_plan, "KEYS_PER_CALL", keys_per_call)
    library = fake_flash.torch_library() if package == "torch" else None
    kernel = varlen_kernels.TorchFlash() if package == "torch" else kernel_from(monkeypatch, package)
    mask = mask_of(tree_of([reasoning_chat()]), kind, 5)
    inputs = random_inputs(mask.tree, head_dim=6, softcap=softcap, sinks=True)
    assert_same(
        output_and_gradients(lambda x: varlen_tree_attention(x, mask, kernel), inputs),
        output_and_gradients(lambda x: torch_tree_attention(x, mask), inputs),
    )
    if library is not None:
        library._destroy()


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("flash_attention_2", r"Install flash-attn \(2.7 or newer\)"),
        ("flash_attention_3", "Install flash-attn"),
        ("kernels-community/flash-attn2", "kernels for a kernel of the Hub"),
        ("torch_varlen", "for CUDA, and there is none"),
    ],
)
def test_a_missing_package_is_named(implementation, message):
    if torch.cuda.is_available():
        pytest.skip("may be installed")
    with pytest.raises(ImportError, match=message):
        varlen_kernels.flash_kernel(implementation)


def test_a_log_sum_exp_of_another_shape_is_refused():
    with pytest.raises(ImportError, match="log-sum-exp of shape"):
        varlen_kernels._output_and_lse((None, torch.zeros(1, 4, 9)), torch.zeros(9, 4, 8))


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (T4, r"compute capability 7\.5, not 8\.0 or more"),
        (DeviceTraits("cuda"), "has none for this device"),
        (gpu(9, 0, has_packed_lse=False), "pads its log-sum-exps"),
    ],
)
def test_torch_varlen_is_refused_where_it_would_crash(device, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(DeviceTraits, "from_device", classmethod(lambda cls, _: device))
    with pytest.raises(ImportError, match=f"{reason}.*attn_implementation='sdpa'"):
        varlen_kernels.flash_kernel.__wrapped__("torch_varlen")


def test_padded_log_sum_exps_of_pytorch_are_noticed(monkeypatch):
    def padded(q, k, v, cu_q, cu_k, max_q, *args, **kwargs):
        return q, torch.zeros(len(cu_q) - 1, q.shape[1], max_q)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", padded)
    mask = mask_of(tree_of([reasoning_chat()]), "causal", 0)
    with pytest.raises(ImportError, match="log-sum-exp of shape"):
        varlen_tree_attention(random_inputs(mask.tree), mask, varlen_kernels.TorchFlash())
