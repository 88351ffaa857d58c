"""QLoRA and Liger: adapters on a quantized base, and fused layers, train as N-pass does with the same model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from support.conversations import chat, tool_chat
from support.pairs import SINGLE_TURNS
from support.trainers import (
    dpo_trainer,
    float32_model,
    in_four_bits,
    logged,
    needs_bitsandbytes,
    needs_weighted_loss,
    parameters,
    single_pass_trainer,
    stock_dpo_trainer,
)
from trl_singlepass import render_samples, verify
from trl_singlepass.engine.enable import UnsupportedModelError
from trl_singlepass.reference import npass_loss_and_gradients


ADAPTER = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
CHATS = [chat(3), chat(2, seed=1), tool_chat()]


def quantized_model(tokenizer, folder):
    """With an adapter whose both factors count."""
    base = in_four_bits(float32_model(tokenizer), folder)
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    return get_peft_model(base, LoraConfig(**ADAPTER))


def with_adapters_in_float32(trainer):
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16, name  # TRL's choice, which would blur the comparison
            parameter.data = parameter.data.float()
    return trainer


@needs_weighted_loss
@needs_bitsandbytes
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "packing": True, "max_length": 4096},
        {"gradient_checkpointing": True, "wave_tokens": 64},
    ],
    ids=["plain", "checkpointed", "packed", "in waves"],
)
def test_a_step_of_qlora_is_that_of_npass_on_the_same_base(tmp_path, tokenizer, settings):
    model = quantized_model(tokenizer, tmp_path / "base")
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, model=model, per_device_train_batch_size=8, **settings)
    with_adapters_in_float32(trainer)
    samples = [sample for messages in CHATS for sample in render_samples(messages, tokenizer)]
    expected = npass_loss_and_gradients(trainer.model, samples)
    gradients = {}
    trainer.add_callback(_Gradients(gradients))
    frozen = {name: value for name, value in parameters(trainer).items() if "lora_" not in name}
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected.loss], abs=1e-5)
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in gradients.items():
        difference = float((gradient - expected.gradients[name]).norm() / expected.gradients[name].norm())
        assert difference < 1e-4, name
    after = parameters(trainer)
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


class _Gradients(TrainerCallback):
    def __init__(self, gradients):
        self.gradients = gradients

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients |= {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }


@needs_bitsandbytes
@pytest.mark.parametrize("own", [{}, {"max_row_tokens": 160}, {"wave_tokens": 50}], ids=str)
def test_qlora_on_pairs_trains_as_stock(tmp_path, tokenizer, own):
    both = []
    for make, settings in ((stock_dpo_trainer, {}), (dpo_trainer, own)):
        base = in_four_bits(float32_model(tokenizer), tmp_path / "base")
        given = {"kwargs": {"peft_config": LoraConfig(**ADAPTER)}, "max_steps": 3, "per_device_train_batch_size": 4}
        trainer = make(tmp_path / "out", tokenizer, SINGLE_TURNS, base, **given, **settings)
        with_adapters_in_float32(trainer).train()
        both.append(trainer)
    stock, single_pass = map(parameters, both)
    assert max(float((stock[name] - single_pass[name]).abs().max()) for name in stock if "lora_" in name) < 1e-5
    for key in ("loss", "logps/chosen", "rewards/margins"):
        assert logged(both[0], key) == pytest.approx(logged(both[1], key), rel=1e-3, abs=1e-4)
    assert len(set(logged(both[0], "loss"))) == 3


@needs_bitsandbytes
def test_verify_holds_on_a_quantized_base_and_sees_a_defect(tmp_path, tokenizer, monkeypatch):
    model = quantized_model(tokenizer, tmp_path / "base")
    weights = {name: value.clone() for name, value in model.named_parameters()}
    report = verify(model, tokenizer, CHATS)
    assert report.ok, report
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    monkeypatch.setattr("trl_singlepass.reference.verification.NOISE_FACTOR", 0.0)
    assert not verify(model, tokenizer, CHATS).ok


@needs_bitsandbytes
def test_eight_bits_are_refused(tmp_path, tokenizer):
    float32_model(tokenizer).save_pretrained(tmp_path)
    eight_bits = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=eight_bits, device_map={"": "cpu"})
    with pytest.raises(UnsupportedModelError, match=r"loaded in 8 bits \(load_in_8bit\).*Use load_in_4bit"):
        verify(model, tokenizer, CHATS)


def test_liger_trains_the_same_step(tmp_path, tokenizer):
    pytest.importorskip("triton", reason="Liger's kernels are written in Triton, which its package imports")
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    if not torch.cuda.is_available():
        pytest.skip("Liger's kernels run on GPUs only")
    trainers = [
        single_pass_trainer(tmp_path, tokenizer, CHATS, use_cpu=False, use_liger_kernel=use) for use in (False, True)
    ]
    for trainer in trainers:
        trainer.train()
    assert logged(trainers[0], "loss") == pytest.approx(logged(trainers[1], "loss"), abs=1e-5)
