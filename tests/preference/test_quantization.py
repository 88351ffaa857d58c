"""QLoRA: adapters on a quantized base train on pairs as stock `DPOTrainer` trains them."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from support.pairs import SINGLE_TURNS, dpo_trainer, stock_dpo_trainer
from support.trainers import NEEDS_BITSANDBYTES, float32_model, logged, parameters


pytestmark = [
    *NEEDS_BITSANDBYTES,
    pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def weights_as_on_a_gpu(monkeypatch):
    """On CPUs with AVX512-BF16, bitsandbytes repacks weights for inference and rounds their scales to bf16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.mark.parametrize("settings", [{}, {"max_row_tokens": 160}, {"wave_tokens": 50}], ids=str)
def test_an_adapter_on_four_bits(tmp_path, tokenizer, settings):
    float32_model(tokenizer).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    both = []
    for make, own in ((stock_dpo_trainer, {}), (dpo_trainer, settings)):
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=four_bits, dtype=torch.float32, device_map={"": "cpu"}
        )
        assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        adapter = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}
        given = {"max_steps": 3, "per_device_train_batch_size": 4, **own}
        trainer = make(tmp_path / "out", tokenizer, SINGLE_TURNS, base, None, adapter, **given)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.bfloat16  # TRL's choice, which would blur the comparison
                parameter.data = parameter.data.float()
        trainer.train()
        both.append(trainer)
    stock, single_pass = map(parameters, both)
    trained = [name for name in stock if "lora_" in name]
    assert max(float((stock[name] - single_pass[name]).abs().max()) for name in trained) < 1e-5
    for key in ("loss", "logps/chosen", "rewards/margins"):
        assert logged(both[0], key) == pytest.approx(logged(both[1], key), rel=1e-3, abs=1e-4)
    assert len(set(logged(both[0], "loss"))) == 3
