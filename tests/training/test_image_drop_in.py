"""What TRL's tests of `SFTTrainer` train with images, on a tiny model with a real processor; and one refusal."""

import pytest
import torch
from peft import LoraConfig

from support.slow import slow_but_for
from support.tiny_vision import screen, tiny_vision_model
from support.trainers import as_dataset, single_pass_trainer


TEXT = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A square."}]}


def question(num_images=1):
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": "What is it?"}]}


LANGUAGE_MODELING = {"messages": [question(), ANSWER], "images": [screen(0)]}
AS_TEXT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A square."}]
CASES = {
    "language modeling": (LANGUAGE_MODELING, {}),
    "prompt and completion": ({"prompt": [question()], "completion": [ANSWER], "images": [screen(0)]}, {}),
    "several images": ({"messages": [question(2), ANSWER], "images": [screen(0), screen(1)]}, {}),
    "column of one image": ({"messages": [question(), ANSWER], "image": screen(0)}, {}),
    "contents as text": ({"messages": AS_TEXT, "images": [screen(0)]}, {}),
    "text only": ({"messages": [*TEXT, ANSWER]}, {}),
    "assistant_only_loss": (LANGUAGE_MODELING, {"assistant_only_loss": True}),
    "packing": (LANGUAGE_MODELING, {"packing": True}),  # which TRL refuses
    "padding_free": (LANGUAGE_MODELING, {"padding_free": True}),  # and this
    "max_length": (LANGUAGE_MODELING, {"max_length": 24}),
    "gradient_checkpointing": (LANGUAGE_MODELING, {"gradient_checkpointing": True}),
}
QUICK = ("language modeling", "text only", "packing")


@pytest.mark.parametrize("case", slow_but_for(QUICK, CASES))
def test_every_form_trains(tmp_path, case):
    row, settings = CASES[case]
    model, processor = tiny_vision_model("qwen3_vl")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = single_pass_trainer(tmp_path, processor, [row] * 3, model, **settings)
    trainer.train()
    moved = [name for name, value in trainer.model.named_parameters() if (value.detach() != start[name]).any()]
    assert any("visual" in name for name in moved) == (case != "text only")
    assert any("language_model" in name for name in moved)


@pytest.mark.slow
def test_adapters_train_and_evaluate(tmp_path):
    model, processor = tiny_vision_model("qwen3_vl")
    kwargs = {
        "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"]),
        "eval_dataset": as_dataset([LANGUAGE_MODELING] * 3),
    }
    trainer = single_pass_trainer(tmp_path, processor, [LANGUAGE_MODELING] * 3, model, kwargs=kwargs)
    trainer.train()
    adapters = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert adapters
    assert all(bool(value.any()) for value in adapters)
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()
