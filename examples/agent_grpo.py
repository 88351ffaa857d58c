"""
Reward an agent with a calculator: GRPO, with each request trained in the context that it was sent.

    python examples/agent_grpo.py --data out/sums.jsonl # writes the tasks that recipes/qwen3-4b-grpo-agent.yaml reads
    MODEL=out/demo-model python examples/agent_grpo.py --max_steps 2

The user names a number, and then what to add to it, turn by turn. The model thinks, may call `add`, and answers; its
template strips the thoughts of earlier turns. A rollout's reward is the share of turns that were answered correctly,
and a little for digits, which a model with random weights can learn.
"""

import argparse
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from trl_singlepass import ServedRollout, SinglePassGRPOConfig, SinglePassGRPOTrainer


NUM_TURNS, NUM_TASKS = 3, 64
Message = dict[str, Any]


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def parse(text: str) -> Message:
    """Return the message that a text says, as Qwen3 and the demo model write it. TRL knows Qwen3's form by itself."""
    reasoning, _, answer = text.removesuffix("<|im_end|>").rpartition("</think>")
    content, *calls = re.split(r"<tool_call>(.*?)</tool_call>", answer, flags=re.DOTALL)[:2]
    message = {"reasoning_content": reasoning.replace("<think>", "").strip(), "content": content.strip()}
    try:
        functions = [json.loads(call) for call in calls]
    except json.JSONDecodeError:  # the model wrote a call that nobody can read
        return {**message, "content": answer.strip()}
    return {**message, "tool_calls": [{"type": "function", "function": function} for function in functions]}


def numbers(messages: list[Message]) -> list[int]:
    """Return the totals that the turns of a conversation ask for."""
    total, totals = 0, []
    for message in messages:
        if message["role"] == "user":
            total += int(re.findall(r"\d+", message["content"])[-1])
            totals.append(total)
    return totals


def next_turn(messages: list[Message]) -> list[Message]:
    """Ask for the next sum, until all turns have been asked."""
    totals = numbers(messages)
    question = f"Add {1 + totals[-1] % 9}. What is the total now?"
    return [{"role": "user", "content": question}] if len(totals) < NUM_TURNS else []


def reward(messages: list[list[Message]], **_: Any) -> list[float]:
    scores = []
    for rollout in messages:
        is_answer = [m["role"] == "assistant" and not m.get("tool_calls") for m in rollout]
        answers = [message["content"] for message, own in zip(rollout, is_answer, strict=True) if own]
        right = [str(total) in answer for total, answer in zip(numbers(rollout), answers, strict=False)]
        digits = [sum(letter.isdigit() for letter in answer) / max(1, len(answer)) for answer in answers]
        scores.append(sum(right) / NUM_TURNS + 0.1 * sum(digits) / max(1, len(digits)))
    return scores


rollouts = ServedRollout([add], reply=next_turn, parse=parse, max_requests=2 * NUM_TURNS)


def make_tasks() -> list[dict[str, Any]]:
    rng = random.Random(0)
    texts = [f"Remember {rng.randrange(10, 100)}. What is the total?" for _ in range(NUM_TASKS)]
    return [{"prompt": [{"role": "user", "content": text}]} for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL", "Qwen/Qwen3-0.6B"))
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--data", type=Path, help="Only write the tasks to this file.")
    options = parser.parse_args()
    if options.data is not None:
        options.data.parent.mkdir(parents=True, exist_ok=True)
        options.data.write_text("".join(f"{json.dumps(task)}\n" for task in make_tasks()), encoding="utf-8")
        return
    trainer = SinglePassGRPOTrainer(
        model=options.model,
        reward_funcs=reward,
        args=SinglePassGRPOConfig(
            output_dir="out/agent-grpo",
            max_steps=options.max_steps,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=24,  # of a request
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list(make_tasks()),
        rollout_func=rollouts,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
