"""
GRPO from one start, in served and in kept contexts; the reward is measured as served.

    python -m studies.rollouts --seeds 5 --steps 40

The task: think of a digit and say one, then, asked for it, say the digit that was thought of. The template that is
served strips the thought before the second request, so that only a model that says what it thinks can know it.
"""

import argparse
import copy
import json
import random
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    set_seed,
)

from benchmarks.machine import describe
from trl_singlepass import ServedRollout, SinglePassGRPOConfig, SinglePassGRPOTrainer


RESULTS = Path(__file__).parent / "results.json"
MARKS = ("<pad>", "<user>", "<model>", "<think>", "</think>", "<end>", "pick", "recall")
DIGITS = tuple("0123456789")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} <end> {% else %}<model> "
    "{% if keep or loop.last %}<think> {{ m.reasoning_content }} </think> {% endif %}{{ m.content }} <end> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<model> {% endif %}"
)
ARMS = {"served": {"keep": False}, "kept": {"keep": True}}
Message = dict[str, Any]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate((*MARKS, *DIGITS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


def parse(text: str) -> Message:
    """Return the message that a text says; one that is malformed says and thinks nothing."""
    words = text.split()
    is_well_formed = len(words) == 5 and (words[0], words[2], words[4]) == ("<think>", "</think>", "<end>")
    thought, said = (words[1], words[3]) if is_well_formed else ("", "")
    return {"reasoning_content": thought, "content": said}


def recall(messages: list[Message]) -> list[Message]:
    return [] if messages[-2]["content"] == "recall" else [{"role": "user", "content": "recall"}]


def reward(messages: list[list[Message]], **_: Any) -> list[float]:
    """1 for a rollout whose second answer is the first thought."""
    answers = [[message for message in rollout if message["role"] == "assistant"] for rollout in messages]
    return [float(len(a) == 2 and a[1]["content"] == a[0]["reasoning_content"] != "") for a in answers]


def conversation(thought: str, said: str, answer: str) -> list[Message]:
    first = {"role": "assistant", "reasoning_content": thought, "content": said}
    second = {"role": "assistant", "reasoning_content": answer, "content": answer}
    return [{"role": "user", "content": "pick"}, first, {"role": "user", "content": "recall"}, second]


def make_start(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> PreTrainedModel:
    """
    Return a model that knows the form, and sometimes repeats a digit that it reads.

    It is fine-tuned on thoughts and first answers that are drawn at random, in both kinds of context alike. The second
    answer is a digit before it, the thought if the context has it and else the first answer, three times in ten.
    """
    set_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads, pad_token_id=0, eos_token_id=5))
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(seed)
    data = []
    for number in range(2000):
        thought, said, other = rng.choices(DIGITS, k=3)
        keep = number % 2 == 0
        known = thought if keep else said
        messages = conversation(thought, said, known if rng.random() < 0.3 else other)
        data += [
            tokenizer.apply_chat_template(part, keep=keep, return_dict=False) for part in (messages[:2], messages)
        ]
    for _ in range(steps):
        lines = rng.sample(data, 128)
        width = max(map(len, lines))
        ids = torch.tensor([line + [0] * (width - len(line)) for line in lines])
        labels = ids.masked_fill(ids == 0, -100)
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class Study(SinglePassGRPOTrainer):
    """Measures the reward of rollouts as served, beside training."""

    def measure(self, keep: bool, number: int = 256) -> float:
        before, self.chat_template_kwargs = self.chat_template_kwargs, {"keep": keep}
        state = torch.get_rng_state()
        torch.manual_seed(0)
        made = self._rollout_func([[{"role": "user", "content": "pick"}]] * number, self)
        self._pending_metrics.clear()
        self.chat_template_kwargs = before
        torch.set_rng_state(state)
        return statistics.mean(reward(made["messages"]))


def run(seed: int, steps: int, every: int, start_steps: int = 300) -> list[dict[str, Any]]:
    """Train both arms from one start, and return their rewards, as served and in kept contexts, every few steps."""
    torch.set_num_threads(1)
    start = make_start(make_tokenizer(), seed, start_steps)
    return [train(arm, copy.deepcopy(start), seed, steps, every) for arm in ARMS]


def train(arm: str, model: PreTrainedModel, seed: int, steps: int, every: int) -> dict[str, Any]:
    tokenizer, found = make_tokenizer(), {"arm": arm, "seed": seed, "step": [], "served": [], "kept": []}
    with TemporaryDirectory() as folder:
        args = SinglePassGRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            num_generations=16,
            max_completion_length=6,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            beta=0.0,
            chat_template_kwargs=ARMS[arm],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=steps,
            disable_tqdm=True,
            seed=seed,
        )
        trainer = Study(
            model,
            reward,
            args,
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "pick"}]] * 64}),
            processing_class=tokenizer,
            rollout_func=ServedRollout(reply=recall, parse=parse, max_requests=2),
        )
        trainer.add_callback(Measuring(trainer, found, every))
        trainer.train()
    return found


class Measuring(TrainerCallback):
    """Measures a trainer before its first step, and every few steps."""

    def __init__(self, trainer: Study, found: dict[str, Any], every: int) -> None:
        self.trainer, self.found, self.every = trainer, found, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.found["step"].append(state.global_step)
            for name, options in ARMS.items():
                self.found[name].append(self.trainer.measure(**options))


def interval(values: list[float]) -> str:
    """Return the mean, and half the width of its 95 % interval, in percent."""
    t = {3: 4.303, 5: 2.776, 8: 2.365, 10: 2.262}[len(values)]
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def table(runs: list[dict[str, Any]]) -> str:
    """Return the rewards of all arms at the start, in the middle and at the end, as served and in kept contexts."""
    steps = runs[0]["step"]
    chosen = [0, len(steps) // 2, len(steps) - 1]
    titles = " | ".join(f"{where}, step {steps[i]}" for where in ("as served", "as kept") for i in chosen)
    lines = [f"| trained in | {titles} |", f"| --- |{' ---: |' * 6}"]
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        cells = [interval([run[where][i] for run in own]) for where in ("served", "kept") for i in chosen]
        lines.append(f"| {arm} contexts | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    task = partial(run, steps=options.steps, every=options.every)
    runs: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.processes) as pool:
        for of_seed in pool.map(task, range(options.seeds)):
            runs += of_seed
            options.output.write_text(json.dumps({**describe("cpu"), "runs": runs}, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
