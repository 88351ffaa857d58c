"""Rollouts of agents, made or recorded: request after request, each with the prompt that it was sent."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl import GRPOTrainer
from trl.chat_template_utils import add_response_schema, parse_response

from ..data.conversations import example_to_samples
from ..data.preparation import say
from ..data.settings import RowSettings
from ..data.tokenized_turns import get_tokenized_turns
from ..trees.prefix_tree import PrefixTree
from ..trees.sample import Sample
from ..trees.shared_array import common_prefix_length


Message = dict[str, Any]
Rewrite = Callable[[list[Message]], list[Message]]
"""From the messages of a conversation to others."""


@dataclass(eq=False)
class _Agent:
    """A rollout that is being made."""

    messages: list[Message]  # of the next request
    functions: Mapping[str, Callable[..., Any]]  # the tools, by name
    contexts: list[tuple[list[int], int]] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # empty if the backend gives none
    num_calls: int = 0
    num_failures: int = 0
    is_done: bool = False

    def __post_init__(self) -> None:
        self.transcript = list(self.messages)  # all messages, whatever becomes of the history
        self.schemas = [get_json_schema(function) for function in self.functions.values()] or None

    def say(self, messages: Sequence[Message]) -> None:
        self.messages = [*self.messages, *messages]
        self.transcript += messages


class ServedRollout:
    """
    A `rollout_func` of agents: every request is rendered by the chat template, and trained in what it was sent.

    The template's own rule about earlier reasoning applies, as where the model is served; TRL appends what tools
    return instead. The trainer generates, with transformers or vLLM. Tools and environments of a GRPO trainer
    (`tools`, `environment_factory`) are called here.

    Args:
        tools (`Sequence[Callable]`, *optional*):
            Functions that the model may call, beside those of the trainer; they may be async.
        history (`Callable`, *optional*):
            Returns the messages of the next request, given those so far, such as without old results of tools.
        reply (`Callable`, *optional*):
            Returns the messages that follow an answer without calls, given all so far; none end the rollout.
        parse (`Callable`, *optional*):
            Returns the message that a text says, special tokens included. By default, the rules of the tokenizer do,
            or those that TRL has for its template, and without any, a message is its text.
        max_requests (`int`, *optional*, defaults to 16):
            After as many requests, a rollout ends; also where a request and `max_completion_length` do not fit in the
            model's context.

    Reward functions get `messages`, the whole conversation of each rollout, `tool_calls` and `tool_failures`. The log
    gets the mean number of requests, and the share of rollouts that ended at a limit.
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]] = (),
        *,
        history: Rewrite | None = None,
        reply: Rewrite | None = None,
        parse: Callable[[str], Message] | None = None,
        max_requests: int = 16,
    ) -> None:
        self.tools, self.history, self.reply, self.parse = tools, history, reply, parse
        self.max_requests = max_requests

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """Return the fields of rollouts, one for each prompt."""
        if any(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                "ServedRollout renders messages, and a prompt is a text. Give prompts as lists of messages."
            )
        own = {tool.__name__: tool for tool in self.tools}
        calls = [trainer._sync_tool_dicts, trainer._async_tool_dicts] if getattr(trainer, "tools", None) else []
        tools = [own | {k: f for of_kind in calls for k, f in of_kind[i].items()} for i in range(len(prompts))]
        agents = [_Agent(list(prompt), functions) for prompt, functions in zip(prompts, tools, strict=True)]
        tokenizer = self._parser(trainer._tokenizer, has_tools=any(tools))
        iterations = getattr(trainer.args, "max_tool_calling_iterations", None)
        limit, num_stopped = _context_length(trainer) - trainer.args.max_completion_length, 0
        for _ in range(self.max_requests if iterations is None else min(self.max_requests, iterations + 1)):
            active = [agent for agent in agents if not agent.is_done]
            asked = [self._render(agent, tokenizer, trainer.chat_template_kwargs) for agent in active]
            for agent, prompt in zip(active, asked, strict=True):
                agent.is_done = bool(agent.contexts) and len(prompt) > limit
                num_stopped += agent.is_done
            pairs = [(agent, prompt) for agent, prompt in zip(active, asked, strict=True) if not agent.is_done]
            made = _generate(trainer, [prompt for _, prompt in pairs], agents)
            if made is None:
                break
            for (agent, prompt), (output, log_probs) in zip(pairs, made, strict=True):
                agent.contexts.append((prompt, len(output)))
                agent.completion_ids += output
                agent.logprobs += log_probs
                agent.say([self._message(tokenizer, agent, prompt, output)])
            self._answer([agent for agent, _ in pairs])
        num_stopped += sum(not agent.is_done for agent in agents)
        trainer._log_metric("rollouts/requests", sum(len(agent.contexts) for agent in agents) / len(agents))
        trainer._log_metric("rollouts/ended_at_limit", num_stopped / len(agents))
        return {
            "prompt_ids": [agent.contexts[0][0] for agent in agents],
            "completion_ids": [agent.completion_ids for agent in agents],
            "logprobs": [agent.logprobs for agent in agents] if trainer.use_vllm else None,
            "contexts": [agent.contexts for agent in agents],
            "messages": [agent.transcript for agent in agents],
            "tool_calls": [agent.num_calls for agent in agents],
            "tool_failures": [agent.num_failures for agent in agents],
        }

    def _parser(self, tokenizer: PreTrainedTokenizerBase, *, has_tools: bool) -> PreTrainedTokenizerBase:
        """Return the tokenizer with rules that read calls and reasoning, if it has none and TRL knows its template."""
        if self.parse is not None or _has_rules(tokenizer):
            return tokenizer
        parser = copy.copy(tokenizer)
        try:
            add_response_schema(parser)
        except ValueError as error:
            if has_tools:
                raise ValueError(
                    "No rules to read the calls of tools from what the model generates: TRL does not know the chat "
                    "template. Pass parse=, a function from a text to a message, or set tokenizer.response_template."
                ) from error
        return parser

    def _render(self, agent: _Agent, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[int]:
        given = {"tools": agent.schemas, "add_generation_prompt": True, "return_dict": False, **options}
        ids: list[int] = tokenizer.apply_chat_template(agent.messages, **given)
        return ids

    def _message(
        self, tokenizer: PreTrainedTokenizerBase, agent: _Agent, prompt: list[int], output: list[int]
    ) -> Message:
        if self.parse is not None:
            message = self.parse(tokenizer.decode(output))
        elif _has_rules(tokenizer) and output:
            message = parse_response(tokenizer, output, prefix=prompt, tools=agent.schemas)
        else:
            message = {"content": tokenizer.decode(output, skip_special_tokens=True)}
        return {"role": "assistant", **message}

    def _answer(self, agents: Sequence[_Agent]) -> None:
        """Give rollouts what follows their last message, and end those that nothing follows."""
        calls = [(agent, call["function"]) for agent in agents for call in agent.messages[-1].get("tool_calls") or ()]
        results = _call_all([(agent.functions.get(call["name"]), call) for agent, call in calls])
        for agent in agents:
            own = [(call, result) for (caller, call), result in zip(calls, results, strict=True) if caller is agent]
            agent.num_calls += len(own)
            agent.num_failures += sum(isinstance(result, Exception) for _, result in own)
            answers = [_tool_message(call["name"], result) for call, result in own]
            if not own and self.reply is not None:
                answers = self.reply(list(agent.transcript))
            agent.is_done = not answers
            agent.say(answers)
            if answers and self.history is not None:
                agent.messages = self.history(copy.deepcopy(agent.messages))


def _has_rules(tokenizer: PreTrainedTokenizerBase) -> bool:
    return any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))


def _tool_message(name: str, result: Any) -> Message:
    """Return what a tool says; the model reads of an error as TRL's trainers let it."""
    content = {"error": str(result)} if isinstance(result, Exception) else result
    return {"role": "tool", "name": name, "content": content if isinstance(content, list) else str(content)}


def _call_all(calls: Sequence[tuple[Callable[..., Any] | None, Message]]) -> list[Any]:
    """Return what functions return or raise; what is async runs together."""
    results: list[Any] = []
    for function, call in calls:
        try:
            if function is None:
                raise ValueError(f"Tool {call['name']} not found.")
            results.append(function(**call["arguments"]))
        except Exception as error:  # the model is told, and it is counted
            results.append(error)

    async def wait(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    if waiting := [index for index, result in enumerate(results) if inspect.isawaitable(result)]:
        with ThreadPoolExecutor(1) as thread:  # notebooks have a loop of their own, in which none can be run
            found = thread.submit(asyncio.run, wait([results[index] for index in waiting])).result()
        for index, result in zip(waiting, found, strict=True):
            results[index] = result
    return results


def _context_length(trainer: Any) -> int:
    """Return the longest sequence that can be generated, in tokens."""
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        return int(trainer.vllm_generation.llm.llm_engine.model_config.max_model_len)
    config = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 2**31


def _generate(
    trainer: Any, prompts: list[list[int]], agents: Sequence[_Agent]
) -> list[tuple[list[int], list[float]]] | None:
    """
    Return what follows each prompt, with its log-probabilities, if the backend gives them; `None` if no rank asks.

    All ranks ask for equally many: sharded models and servers wait for them. What fills the batch is thrown away.
    """
    number = torch.tensor([len(prompts)], device=trainer.accelerator.device)
    most = int(trainer.accelerator.gather(number).max())
    if most == 0:
        return None
    filler = prompts[0] if prompts else agents[0].contexts[0][0]
    asked = [*prompts, *[filler] * (most - len(prompts))]
    if trainer.use_vllm:
        _, outputs, top, _ = trainer.vllm_generation.generate(prompts=asked, images=None, num_generations=1)
        log_probs = [[of_token[0] for of_token in line] for line in top]
    else:
        is_grpo = isinstance(trainer, GRPOTrainer)
        found = trainer._generate_single_turn(asked, None, {}, *([1] if is_grpo else []))
        outputs, log_probs = found[0] if is_grpo else found, [[]] * most
    return list(zip(outputs, log_probs, strict=True))[: len(prompts)]


# What was recorded ---------------------------------------------------------------------------------------------------


class RecordedRollouts:
    """
    A `rollout_func` that returns recorded rollouts; `prompts` is the dataset to train on, `reward` a reward function.

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
        groups = [self._groups[int(prompt[0]["group"])] for prompt in prompts]
        first = trainer.accelerator.process_index * len(prompts)
        found = [group[index % len(group)] for index, group in enumerate(groups, first)]
        fields = {name: [rollout[name] for rollout in found] for name in found[0]}
        if not self._has_log_probs:
            return {**fields, "logprobs": None}
        if isinstance(trainer, GRPOTrainer):
            # TRL corrects for another policy where vLLM generated; a log is corrected alike, and gets no weights.
            trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
            trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        return fields

    @staticmethod
    def reward(recorded_reward: list[float], **_: Any) -> list[float]:
        """Return the rewards that were recorded."""
        return recorded_reward


def _to_fields(example: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a `rollout_func` returns of one rollout."""
    reward = example.get("reward")
    if not isinstance(reward, int | float):
        raise ValueError(f"Row {index} has no number in 'reward': {reward!r}. Give each rollout its reward.")
    samples = example_to_samples(example, index, tokenizer, RowSettings()).samples
    halves = [np.split(sample.token_ids, [sample.prompt_length]) for sample in samples]
    weights = np.concatenate([sample.loss_weights[sample.prompt_length :] for sample in samples])
    if any(sample.image_features is not None for sample in samples):
        raise ValueError(f"Row {index} has images, which requests cannot show yet. Leave it out.")
    if not np.isin(weights, (0, 1)).all():
        raise ValueError(f"Row {index} has loss weights other than 0 and 1, which a rollout cannot have. Remove them.")
    turns = get_tokenized_turns(example) or ()
    given: list[Any] = [turns[sample.turn_index].get("logprobs") if turns else None for sample in samples]
    return {
        "prompt_ids": halves[0][0].tolist(),
        "completion_ids": np.concatenate([output for _, output in halves]).tolist(),
        "logprobs": None if None in given else [value for own in given for value in own],
        "env_mask": weights.astype(int).tolist(),
        "contexts": [(prompt.tolist(), len(output)) for prompt, output in halves],
        "recorded_reward": float(reward),
    }


def audit_rollouts(fields: Mapping[str, Any], fork_threshold_tokens: int = 1024) -> dict[str, int]:
    """
    Return what becomes of the tokens of rollouts, in the fields that a `rollout_func` returns, `contexts` among them.

    `trained_by_async_grpo` are those that TRL's AsyncGRPO trains of those that were `generated`, by default: it goes
    on with the row of the request before if a prompt begins with it. Where the prompt differs within the last output,
    by fewer tokens than the threshold, what differs becomes context. Otherwise it begins a row. `in_rows` are tokens
    of one row per request, `in_trees` those of one tree per rollout.
    """
    counts = dict.fromkeys(("requests", "generated", "trained_by_async_grpo", "in_rows", "in_trees"), 0)
    for completion, contexts in zip(fields["completion_ids"], fields["contexts"], strict=True):
        outputs = np.split(np.asarray(completion, np.int64), np.cumsum([length for _, length in contexts])[:-1])
        requests = [(np.asarray(p, np.int64), output) for (p, _), output in zip(contexts, outputs, strict=True)]
        samples = [Sample.from_prompt_and_completion(*request) for request in requests if len(request[1])]
        counts["requests"] += len(requests)
        counts["generated"] += len(completion)
        counts["trained_by_async_grpo"] += _num_trained(requests, fork_threshold_tokens)
        counts["in_rows"] += sum(map(len, samples))
        counts["in_trees"] += len(PrefixTree.from_samples(samples))
    return counts


def _num_trained(requests: Sequence[tuple[Any, Any]], fork_threshold: int) -> int:
    """Return the number of generated tokens of a rollout that AsyncGRPO trains."""
    held, is_trained, last, total = np.empty(0, np.int64), np.empty(0, bool), 0, 0
    for prompt, output in requests:
        matched = common_prefix_length(held, prompt)
        drift = len(held) - matched
        if drift and not (matched >= last and drift < fork_threshold):
            total += int(is_trained.sum())
            is_trained, matched = is_trained[:0], 0
        is_context = np.zeros(len(prompt) - matched, bool)
        is_trained = np.concatenate([is_trained[:matched], is_context, np.ones(len(output), bool)])
        held, last = np.concatenate([prompt, output]), len(prompt)
    return total + int(is_trained.sum())
