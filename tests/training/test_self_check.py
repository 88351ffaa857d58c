"""The measured check of a run: before its first step, for conversations and pairs, and when a run resumes."""

import pytest
import torch

from support.conversations import chat
from support.image_chats import image_collator, image_rows, image_sample_sets
from support.image_models import image_model
from support.planted_layers import plant
from support.trainers import SETTINGS, float32_model, single_pass_trainer
from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer
from trl_singlepass.engine.check.checked_model import TreeCheckError
from trl_singlepass.engine.check.tree_check import TreeCheck
from trl_singlepass.images.reading import image_module


CHATS = [chat(3), chat(2, seed=1)]


@pytest.mark.filterwarnings("ignore")
def test_images_of_the_data_are_in_the_row(tmp_path, tokenizer, monkeypatch):
    """A vision tower whose features depend on how many images it is given is found with an image only."""
    model = image_model("qwen3_vl", torch.float32)
    rows = image_rows(image_sample_sets(model))
    shown = []
    run = TreeCheck.run
    monkeypatch.setattr(TreeCheck, "run", lambda self, text, images: shown.append(images) or run(self, text, images))
    args = SinglePassSFTConfig(str(tmp_path), **SETTINGS, per_device_train_batch_size=4)
    for is_wrong in (False, True):
        tower = image_module(model).visual
        forward = tower.forward

        def counting(pixels, *args, forward=forward, is_wrong=is_wrong, **kwargs):
            return forward(pixels * (1 + 0.1 * is_wrong * len(pixels)), *args, **kwargs)

        tower.forward = counting
        trainer = SinglePassSFTTrainer(
            model, args, image_collator(model), train_dataset=rows, processing_class=tokenizer
        )
        if is_wrong:
            with pytest.raises(TreeCheckError):
                trainer.train()
        else:
            trainer.train()
        tower.forward = forward
    assert all(len(images) == 2 for images in shown)


def test_the_check_can_be_turned_off_and_the_log_says_so(tmp_path, tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr("trl_singlepass.training.self_check.say", lambda line, level: said.append(line))
    model, _ = plant(float32_model(tokenizer), "TokenShift")
    single_pass_trainer(tmp_path, tokenizer, CHATS, model, self_check=False).train()
    assert len(said) == 1
    assert "self_check=False" in said[0]


def test_a_run_is_checked_once_and_again_when_it_resumes(tmp_path, tokenizer, monkeypatch):
    runs = []
    run = TreeCheck.run
    monkeypatch.setattr(TreeCheck, "run", lambda self, *tokens: runs.append(1) or run(self, *tokens))
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, **settings)
    trainer.train()
    assert len(runs) == 1
    resumed = single_pass_trainer(tmp_path, tokenizer, CHATS, **{**settings, "max_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    assert len(runs) == 2


def test_an_evaluation_without_training_is_checked(tmp_path, tokenizer):
    model, _ = plant(float32_model(tokenizer), "TokenShift")
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, model)
    with pytest.raises(TreeCheckError, match="TokenShift"):
        trainer.evaluate(trainer.train_dataset)


def test_a_model_that_was_compiled_by_the_trainer_is_checked_as_it_was_written(tmp_path, tokenizer):
    model, _ = plant(float32_model(tokenizer), "TokenShift")
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, model, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(TreeCheckError, match="TokenShift"):
        trainer.train()
    torch.compiler.reset()
