"""Prompts that share a system message, a reward for their completions, and lines as TRL pads them."""

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from support.tiny_vision import screen
from support.trainers import SETTINGS, logged, parameters
from trl_singlepass import SinglePassGRPOConfig, SinglePassGRPOTrainer, SinglePassRLOOConfig, SinglePassRLOOTrainer


GRPO = (GRPOTrainer, GRPOConfig), (SinglePassGRPOTrainer, SinglePassGRPOConfig)
RLOO = (RLOOTrainer, RLOOConfig), (SinglePassRLOOTrainer, SinglePassRLOOConfig)

STEPS = {
    "max_steps": 3,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 6,
    "learning_rate": 0.05,
    "gradient_checkpointing": False,
}
SYSTEM = {"role": "system", "content": "You count pens and boxes, and you answer in a few words at most. " * 2}
QUESTIONS = ("How many pens are in 7 boxes?", "Is it cold?", "Split 54 pens.", "Name a city.")


def as_prompts():
    return Dataset.from_dict({"prompt": [[SYSTEM, {"role": "user", "content": question}] for question in QUESTIONS]})


def image_prompts():
    """Return prompts that show one image or two, some of them twice."""
    shown = [[screen(0)], [screen(1), screen(0)], [screen(2)], [screen(1), screen(3)]]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": question}], "images": images}
            for question, images in zip(QUESTIONS, shown, strict=True)
        ]
    )


def reward(completions, score=None, **kwargs):
    """A reward that differs within a group, whatever the model says; a rollout may bring its own."""
    return score or [float(len(completion[0]["content"]) % 7) for completion in completions]


def padded(lines):
    """Return ids, mask and what is scored of `(prompt, completion)`, padded on the left and on the right."""
    longest = [max(len(line[part]) for line in lines) for part in (0, 1)]
    ids, mask, scored = [], [], []
    for prompt, completion in lines:
        left, right = longest[0] - len(prompt), longest[1] - len(completion)
        ids.append([0] * left + prompt + completion + [0] * right)
        mask.append([0] * left + [1] * len(prompt + completion) + [0] * right)
        scored.append([0] * longest[0] + [1] * len(completion) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(scored)


def train(kind, tmp_path, model, tokenizer, dataset=None, peft_config=None, rollouts=None, parts=None, **settings):
    """Return a trainer that has trained, and the parameters before; `rollouts` makes its `rollout_func`."""
    trainer_class, config_class = kind
    args = config_class(str(tmp_path), **{**SETTINGS, **STEPS, **settings})
    model = str(model) if not isinstance(model, torch.nn.Module) else model
    torch.manual_seed(0)  # of new adapters
    parts = {"train_dataset": dataset or as_prompts(), "processing_class": tokenizer, **(parts or {})}
    parts["peft_config"] = peft_config
    if rollouts is not None:
        parts["rollout_func"] = rollouts()
    trainer = trainer_class(model, args=args, **{"reward_funcs": reward, **parts})
    before = parameters(trainer)
    trainer.train()
    return trainer, before


def assert_equal(both, tmp_path, model, tokenizer, own=None, tolerance=1e-4, **settings):
    """Assert that trainers of TRL and of this project move parameters alike; return ours."""
    make = model if callable(model) and not isinstance(model, torch.nn.Module) else lambda: model
    stock, before = train(both[0], tmp_path / "stock", make(), tokenizer, **settings)
    ours, _ = train(both[1], tmp_path / "ours", make(), tokenizer, **settings, **(own or {}))
    assert_moved_alike(ours, stock, before, tolerance)
    return ours


def assert_moved_alike(ours, stock, before, tolerance):
    assert logged(ours, "reward") == logged(stock, "reward")
    expected, found = parameters(stock), parameters(ours)
    moved = max(float((expected[name] - value).abs().max()) for name, value in before.items())
    off = max(float((found[name] - value).abs().max()) for name, value in expected.items())
    assert moved > 1e-5
    assert off <= tolerance * moved, f"off by {off:.1e}, moved by {moved:.1e}"
