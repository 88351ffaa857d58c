"""Rollouts of agents: request after request, each rendered as a server renders it, until the model calls no tool."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl import GRPOTrainer
from trl.chat_template_utils import add_response_schema, parse_response


Message = dict[str, Any]
Rewrite = Callable[[list[Message]], list[Message]]
"""From the messages of a conversation to others."""


@dataclass(eq=False)
class _Agent:
    """A rollout that is being made."""

    messages: list[Message]  # of the next request
    functions: Mapping[str, Callable[..., Any]]  # the tools, by name
    transcript: list[Message] = field(default_factory=list)  # all messages, whatever became of the history
    contexts: list[tuple[list[int], int]] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    num_calls: int = 0
    num_failures: int = 0
    is_done: bool = False

    def __post_init__(self) -> None:
        self.transcript = list(self.messages)
        self.schemas = [get_json_schema(function) for function in self.functions.values()] or None

    def render(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            self.messages, tools=self.schemas, add_generation_prompt=True, return_dict=False, **options
        )
        return ids

    def record(self, prompt: list[int], output: list[int], log_probs: list[float] | None) -> None:
        self.contexts.append((prompt, len(output)))
        self.completion_ids += output
        self.logprobs = None if log_probs is None or self.logprobs is None else self.logprobs + log_probs

    def say(self, messages: Sequence[Message]) -> None:
        self.messages = [*self.messages, *messages]
        self.transcript += messages


class ServedRollout:
    """
    A `rollout_func` of agents: every request is rendered by the chat template, and trained in what it was sent.

    The template's own rule about earlier reasoning applies, as it does where the model is served: TRL appends what
    tools return to the tokens of a rollout instead. Requests are generated as the trainer generates: by transformers
    or by vLLM. Tools and environments of a [`SinglePassGRPOTrainer`] (`tools`, `environment_factory`) are called here.

    Args:
        tools (`list[Callable]`, *optional*):
            Functions that the model may call, beside those of the trainer; they may be async.
        history (`Callable`, *optional*):
            Returns the messages of the next request, given those so far, such as without old results of tools.
        reply (`Callable`, *optional*):
            Returns the messages that follow an answer without calls, given all so far; none end the rollout.
        parse (`Callable`, *optional*):
            Returns the message that a text says, special tokens included. By default, TRL's rules for known templates
            (`add_response_schema`) or the tokenizer's own do, and without them a message is its text.
        max_requests (`int`, *optional*, defaults to 16):
            After as many requests, a rollout ends. It also ends where a request and `max_completion_length` do not
            fit in the model's context.

    Reward functions get `messages`, the whole conversation of each rollout, `tool_calls` and `tool_failures`. The log
    gets the mean number of requests, and the share of rollouts that ended at a limit.

    Example: `SinglePassGRPOTrainer(…, tools=[search], rollout_func=ServedRollout(history=clear_old_results))`.
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
        agents = [_Agent(list(prompt), self._functions(trainer, i)) for i, prompt in enumerate(prompts)]
        tokenizer = self._parser(trainer._tokenizer, has_tools=any(agent.functions for agent in agents))
        num_stopped = 0
        for _ in range(self._most_requests(trainer)):
            active, asked = [], []
            for agent in (agent for agent in agents if not agent.is_done):
                prompt = agent.render(tokenizer, trainer.chat_template_kwargs)
                if agent.contexts and len(prompt) + trainer.args.max_completion_length > _context_length(trainer):
                    agent.is_done, num_stopped = True, num_stopped + 1
                    continue
                active.append(agent)
                asked.append(prompt)
            outputs, log_probs = _generate(trainer, asked, agents)
            if outputs is None:
                break
            for agent, prompt, output, own in zip(active, asked, outputs, log_probs, strict=True):
                agent.record(prompt, output, own)
                agent.say([self._message(tokenizer, agent, prompt, output)])
            self._answer(active)
        num_stopped += sum(not agent.is_done for agent in agents)
        trainer._log_metric("rollouts/requests", sum(len(agent.contexts) for agent in agents) / len(agents))
        trainer._log_metric("rollouts/ended_at_limit", num_stopped / len(agents))
        has_log_probs = all(agent.logprobs is not None for agent in agents)
        return {
            "prompt_ids": [agent.contexts[0][0] for agent in agents],
            "completion_ids": [agent.completion_ids for agent in agents],
            "logprobs": [agent.logprobs for agent in agents] if has_log_probs else None,
            "contexts": [agent.contexts for agent in agents],
            "messages": [agent.transcript for agent in agents],
            "tool_calls": [agent.num_calls for agent in agents],
            "tool_failures": [agent.num_failures for agent in agents],
        }

    def _functions(self, trainer: Any, index: int) -> dict[str, Callable[..., Any]]:
        """Return the tools of one rollout: those given, the trainer's, and the methods of its environment."""
        functions = {tool.__name__: tool for tool in self.tools}
        if getattr(trainer, "tools", None):
            functions |= trainer._sync_tool_dicts[index] | trainer._async_tool_dicts[index]
        return functions

    def _most_requests(self, trainer: Any) -> int:
        iterations = getattr(trainer.args, "max_tool_calling_iterations", None)
        return self.max_requests if iterations is None else min(self.max_requests, iterations + 1)

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
) -> tuple[list[list[int]] | None, list[Any]]:
    """
    Return what follows each prompt, and its log-probabilities, if the backend gives them; `None` if no rank asks.

    All ranks ask for equally many: sharded models and servers wait for them. What fills the batch is thrown away.
    """
    number = torch.tensor([len(prompts)], device=trainer.accelerator.device)
    most = int(trainer.accelerator.gather(number).max())
    if most == 0:
        return None, []
    filler = prompts[0] if prompts else agents[0].contexts[0][0]
    asked = [*prompts, *[filler] * (most - len(prompts))]
    if trainer.use_vllm:
        _, outputs, top, _ = trainer.vllm_generation.generate(prompts=asked, images=None, num_generations=1)
        log_probs: list[Any] = [[of_token[0] for of_token in line] for line in top]
    else:
        is_grpo = isinstance(trainer, GRPOTrainer)
        found = trainer._generate_single_turn(asked, None, {}, *([1] if is_grpo else []))
        outputs, log_probs = found[0] if is_grpo else found, [None] * most
    return outputs[: len(prompts)], log_probs[: len(prompts)]
