"""Rollouts from a log: GRPO and RLOO on what an agent did before, each token in the request that generated it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from ..data.conversations import example_to_samples
from ..data.preparation import say
from ..data.settings import RowSettings
from ..data.tokenized_turns import get_tokenized_turns


class RecordedRollouts:
    """
    A `rollout_func` that returns recorded rollouts, and the dataset of prompts that asks for them.

    Args:
        examples (`Iterable[Mapping]`):
            One rollout each, in any form of a conversation (`messages`, `requests`, `turns`), with a number in
            `reward`. Those that begin with the same prompt form groups. The `turns` may have `logprobs`, one for each
            token of their completion, by which GRPO corrects that another policy generated them.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        num_generations (`int`):
            Rollouts of a group, as in the trainer's arguments. Rollouts that fill no group are counted in the log.

    Raises:
        `ValueError`: If an example cannot be read or has no reward, if only some have log-probabilities, or if nothing
            fills a group.

    Example:
        `recorded = RecordedRollouts(log, tokenizer, 8)`, then `SinglePassGRPOTrainer(model, recorded.reward, args,
        train_dataset=recorded.prompts, rollout_func=recorded)`.
    """

    def __init__(
        self, examples: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, num_generations: int
    ) -> None:
        rollouts = [_to_fields(example, index, tokenizer) for index, example in enumerate(examples)]
        self._has_log_probs = any(rollout["logprobs"] is not None for rollout in rollouts)
        if self._has_log_probs and any(rollout["logprobs"] is None for rollout in rollouts):
            raise ValueError("Only some turns have 'logprobs'. Record them for all turns, or leave them out.")
        by_prompt: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for rollout in rollouts:
            by_prompt.setdefault(tuple(rollout["prompt_ids"]), []).append(rollout)
        self._groups = [
            group[start : start + num_generations]
            for group in by_prompt.values()
            for start in range(0, len(group) - num_generations + 1, num_generations)
        ]
        left_out = len(rollouts) - num_generations * len(self._groups)
        counts = f"{left_out} of {len(rollouts)} recorded rollouts fill no group of {num_generations} with one prompt"
        if not self._groups:
            raise ValueError(f"{counts}. Lower num_generations, or record more rollouts of each prompt.")
        say(f"{len(self._groups)} groups; {counts}.", logging.WARNING if left_out else logging.INFO)
        texts = [tokenizer.decode(group[0]["prompt_ids"]) for group in self._groups]
        messages = [[{"role": "user", "content": text, "group": str(i)}] for i, text in enumerate(texts)]
        self.prompts = Dataset.from_dict({"prompt": messages})

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """Return the rollouts of groups; ranks that share a group take different ones."""
        first = trainer.accelerator.process_index * len(prompts)
        found = []
        for index, prompt in enumerate(prompts, first):
            group = self._groups[int(prompt[0]["group"])]
            found.append(group[index % len(group)])
        if self._has_log_probs and isinstance(trainer, GRPOTrainer):
            # TRL corrects for another policy where vLLM generated; a log is corrected alike, and gets no weights.
            trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
            trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        fields = {name: [rollout[name] for rollout in found] for name in found[0]}
        return fields if self._has_log_probs else {**fields, "logprobs": None}

    @staticmethod
    def reward(recorded_reward: list[float], **_: Any) -> list[float]:
        """Return the rewards that were recorded: a reward function of TRL."""
        return recorded_reward


def _to_fields(example: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a `rollout_func` returns of one rollout."""
    reward = example.get("reward")
    if not isinstance(reward, int | float):
        raise ValueError(f"Row {index} has no number in 'reward': {reward!r}. Give each rollout its reward.")
    samples = example_to_samples(example, index, tokenizer, RowSettings()).samples
    completions = [sample.token_ids[sample.prompt_length :].tolist() for sample in samples]
    weights = [sample.loss_weights[sample.prompt_length :] for sample in samples]
    if any(sample.image_features is not None for sample in samples):
        raise ValueError(f"Row {index} has images, which requests cannot show yet. Leave it out.")
    if any(((own != 0) & (own != 1)).any() for own in weights):
        raise ValueError(
            f"Row {index} has loss weights other than 0 and 1, which a rollout cannot have. Leave them out."
        )
    turns = get_tokenized_turns(example)
    given = None if turns is None else [turns[sample.turn_index].get("logprobs") for sample in samples]
    has_log_probs = given is not None and all(own is not None for own in given)
    return {
        "prompt_ids": samples[0].token_ids[: samples[0].prompt_length].tolist(),
        "completion_ids": [token for completion in completions for token in completion],
        "logprobs": [value for own in given or () for value in own] if has_log_probs else None,
        "env_mask": [int(weight) for own in weights for weight in own],
        "contexts": [
            (sample.token_ids[: sample.prompt_length].tolist(), len(completion))
            for sample, completion in zip(samples, completions, strict=True)
        ],
        "recorded_reward": float(reward),
    }
