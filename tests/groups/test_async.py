"""AsyncGRPO on trees trains every generated token of a rollout as one row per request, without a server or a GPU."""

import copy
import queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.trainers import SETTINGS, float32_model, logged, parameters


worker = pytest.importorskip("trl.experimental.async_grpo.async_rollout_worker")
trainers = pytest.importorskip("trl_singlepass.groups.async_trainer")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
LEARNING_RATE, NUM_STEPS, PER_STEP = 0.5, 3, 4


def six_turns(tokenizer, seed, num_turns=6):
    """Return the requests of a conversation of which the template strips the reasoning of earlier turns."""
    messages, turns = [], []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"Question {turn} of {seed}."})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        thought, answer = f"step {turn} " * (4 + seed), f"answer {turn + seed}"
        text = f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>"
        output = tokenizer(text, add_special_tokens=False)["input_ids"]
        turns.append(worker.TurnRecord(prompt, output, [-6.5 + 0.1 * (token % 3) for token in output]))
        messages.append({"role": "assistant", "content": answer, "reasoning_content": thought})
    return turns


class Worker:
    """Hands the trainer rollouts in the rows that TRL's own worker makes of them."""

    def __init__(self, rollouts):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        for group, turns in enumerate(rollouts):
            sequences, _ = worker._chain_to_sequences(turns, str(group), fork_threshold=0)
            for sequence in sequences:
                names = {"input_ids": np.int64, "completion_mask": np.int64, "old_log_probs": np.float32}
                arrays = {name: np.asarray(getattr(sequence, name), dtype) for name, dtype in names.items()}
                sample = {"advantage": 1.0 - group % 3, "model_version": 1, "group_id": group, "metrics": {}}
                self.rollout_buffer.put(worker.RolloutSample(prompt=[], completion=[], **arrays, **sample))

    start = stop = lambda self: None
    update_model_version = check_health = lambda self, _: None


NO_TRANSFER = SimpleNamespace(
    **{name: lambda *_: None for name in ("init_weight_transfer", "pause", "resume", "destroy")},
    send_weights=lambda weights: list(weights),
)


def trained(tmp_path, model, tokenizer, rollouts, config=None, **settings):
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    settings = {
        **SETTINGS,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": PER_STEP,
        "token_budget": 0,
        **settings,
    }
    settings |= {"learning_rate": LEARNING_RATE, "max_staleness": 100}
    config = config or trainers.SinglePassAsyncGRPOConfig
    args = config(str(tmp_path / "out"), gradient_accumulation_steps=1, **settings)
    trainer = trainers.SinglePassAsyncGRPOTrainer(
        str(folder),
        args=args,
        train_dataset=[{"prompt": "unused"}],
        processing_class=tokenizer,
        rollout_worker=Worker(rollouts),
        weight_transfer=NO_TRANSFER,
    )
    trainer.train()
    return trainer


def one_row_per_request(model, rollouts, aux_loss=0.0):
    """Train AsyncGRPO's loss: a sum over the tokens of a step, each in the row of its request, ÷ their number."""
    requests = [(turn, 1.0 - group % 3) for group, turns in enumerate(rollouts) for turn in turns]
    for step in range(NUM_STEPS):
        part, losses = requests[step * PER_STEP : (step + 1) * PER_STEP], []
        for turn, advantage in part:
            ids = torch.tensor([turn.prompt_ids + turn.output_ids])
            start = len(turn.prompt_ids)
            log_probs = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1)
            ratio = (log_probs.gather(-1, ids[0, start:, None])[:, 0] - torch.tensor(turn.output_log_probs)).exp()
            losses.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
        loss = torch.cat(losses).mean()
        if aux_loss:
            ids, mask = padded([turn.prompt_ids + turn.output_ids for turn, _ in part])
            router = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss
            loss = loss + aux_loss * router
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= LEARNING_RATE * parameter.grad
                parameter.grad = None
    return dict(model.named_parameters())


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


FAMILIES = {
    "qwen3": ("qwen3", {}),
    "sinks": ("gpt-oss", {"output_router_logits": False, "router_aux_loss_coef": 0.0}),
    "mixture": ("qwen3-moe", {"output_router_logits": False, "router_aux_loss_coef": 0.1}),
    "recurrent": ("qwen3_5_text", {}),
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in FAMILIES), ("qwen3", {"wave_tokens": 40}), ("mixture", {"wave_tokens": 40})],
)
def test_three_steps(tmp_path, tokenizer, family, settings):
    kind, overrides = FAMILIES[family]
    model = float32_model(tokenizer, kind, "eager", **overrides)
    rollouts = [six_turns(tokenizer, seed) for seed in (0, 2, 4)]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = one_row_per_request(copy.deepcopy(model), rollouts, overrides.get("router_aux_loss_coef", 0.0))
    trainer = trained(tmp_path, model, tokenizer, rollouts, **settings)
    assert trainer.args.fork_threshold_tokens == 0
    num_generated = sum(len(turn.output_ids) for turns in rollouts for turn in turns)
    assert trainer.rollout_worker.rollout_buffer.qsize() <= 3 * 6 - NUM_STEPS * PER_STEP
    trained_tokens = sum(len(turn.output_ids) for turns in rollouts[:2] for turn in turns)
    assert logged(trainer, "num_trained_tokens")[-1] == trained_tokens < num_generated
    assert min(logged(trainer, "sharing_factor")) > 1.2
    found = parameters(trainer)
    moved = max(float((expected[name] - value).abs().max()) for name, value in before.items())
    off = max(float((found[name] - value).abs().max()) for name, value in expected.items())
    assert moved > 1e-3
    assert off <= 1e-5 * moved, f"off by {off:.1e}, moved by {moved:.1e}"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fork_threshold_tokens", {"fork_threshold_tokens": 512}),
        ("max_row_tokens", {"max_row_tokens": 100}),
        ("deepspeed", {"deepspeed": {"zero_optimization": {"stage": 3}}}),
    ],
)
def test_what_is_refused(tmp_path, tokenizer, name, settings):
    with pytest.raises(ValueError, match=name):
        trained(tmp_path, float32_model(tokenizer), tokenizer, [], **settings)


def test_the_attention_is_the_one_that_is_set(tmp_path, tokenizer):
    rollouts = [six_turns(tokenizer, seed) for seed in (0, 2)]
    kwargs = {"attn_implementation": "eager"}
    settings = {"config": trainers.AsyncGRPOConfig, "model_init_kwargs": kwargs, "max_steps": 1}  # TRL's own
    trainer = trained(tmp_path, float32_model(tokenizer), tokenizer, rollouts, **settings)
    assert trainer.args.fork_threshold_tokens == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert trainer.model.config._attn_implementation != plain.config._attn_implementation
    assert trainer.args.model_init_kwargs == kwargs
