"""On a GPU: the trainer moves parameters as stock `SFTTrainer` does: on TRL's fused head, Liger, compiled models."""

import copy
import importlib.util

import pytest
import torch

from support.gpu_or_cpu import DEVICE, needs_device
from support.tiny_models import tiny_model
from support.trainers import parameters, train_both


# Each step runs TRL's fused head, whose kernels are Triton's on a GPU.
SETTINGS = {
    "fused head": {},
    "dft": {"loss_type": "dft", "learning_rate": 10.0},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "liger": {"use_liger_kernel": True},
    # On the CPU, Inductor takes many minutes.
    "compiled": {"torch_compile": True} | ({"torch_compile_backend": "aot_eager"} if DEVICE == "cpu" else {}),
}
FAMILIES = {"qwen3": SETTINGS, "gemma2": ["fused head"], "gpt-oss": ["fused head"]}
CASES = [(family, name) for family, names in FAMILIES.items() for name in names]


def moves_of(tmp_path, tokenizer, model, **settings):
    """How far stock training and the single pass move all parameters, as two vectors."""
    start = copy.deepcopy(model)
    trainers = train_both(tmp_path, tokenizer, model, use_cpu=DEVICE == "cpu", **settings)
    return [
        torch.cat(
            [
                (parameter.cpu() - own).double().flatten()
                for own, parameter in zip(start.parameters(), parameters(trainer).values(), strict=True)
            ]
        )
        for trainer in trainers
    ]


def skip_without(name):
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs liger-kernel")


@pytest.mark.gpu
@needs_device
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_one_step(tmp_path, tokenizer, family, name):
    """In float32 the moves are equal; under bf16=True they are at most twice as far from them as stock training's."""
    skip_without(name)
    model = tiny_model(
        family, len(tokenizer), torch.float32, initializer_range=0.05
    )  # "eager", which all of them have
    stock, ours = moves_of(tmp_path, tokenizer, model, **SETTINGS[name])
    assert float(stock.norm()) > 0
    assert float((ours - stock).norm()) <= 1e-4 * float(stock.norm())
    stock_bf16, ours_bf16 = moves_of(tmp_path, tokenizer, model, bf16=True, **SETTINGS[name])
    assert float((ours_bf16 - stock).norm()) <= 2 * float((stock_bf16 - stock).norm())
