"""What a chat template does with reasoning and with the ends of messages, found out by rendering a small chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ...rendering.checks import template_name
from ...rendering.conversation import Conversation, Message, RenderingError
from ...rendering.message_format import as_read
from ...rendering.template import ChatTemplate
from ...rendering.template_behaviour import get_behaviour


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words that no template writes itself.
_QUESTIONS, _ANSWER = ("Juniper", "Linden", "Maple", "Cedar"), "Aspen"
_REASONINGS = ("Rowan", "Hazel", "Birch", "Alder")


class ReasoningPolicy(StrEnum):
    """Which turns keep their reasoning under a chat template."""

    STRIPPED = "stripped"
    """The last turn alone: the reasoning of earlier turns is removed."""
    KEPT = "kept"
    """All turns."""
    STRIPPED_EVERYWHERE = "stripped from every turn"
    """No turn, not even the last one."""
    MIXED = "mixed"
    """Some earlier turns but not others."""
    REFUSED = "refuses a plain chat"
    """Unknown: the template does not render the small chat."""


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What a chat template does, given the arguments with which a dataset calls it."""

    name: str
    kind: ReasoningPolicy
    last_ending: str  # what the template writes after the last answer of a conversation
    history_ending: str  # what it writes after the same answer once another message follows
    added_stop: str  # stop token added to a last answer because the template writes none


class TemplateSurvey:
    """Measures a chat template once for each set of arguments with which a dataset calls it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, TemplateFacts] = {}

    def get_facts(self, conversation: Conversation) -> TemplateFacts:
        """Return what the template does under the arguments of a conversation."""
        # Some templates keep more reasoning when there are tools; which tools does not matter.
        key = repr([sorted(conversation.template_kwargs.items(), key=str), bool(conversation.tools)])
        if key not in self._known:
            template = ChatTemplate.for_conversation(
                self.tokenizer, None, conversation.tools, conversation.template_kwargs
            )
            self._known[key] = _measure(template)
        return self._known[key]


def _measure(template: ChatTemplate) -> TemplateFacts:
    name = template_name(template.tokenizer, template.source)
    try:
        last, history = _endings(template)
        return TemplateFacts(name, _reasoning_policy(template), last, history, _added_stop(template))
    except RenderingError:  # some do not render a plain chat
        return TemplateFacts(name, ReasoningPolicy.REFUSED, "", "", "")


def _reasoning_policy(template: ChatTemplate) -> ReasoningPolicy:
    policies = [_policy_for_chat(template, _make_chat(message)) for message in (_under_key, _inline)]
    known = (policy for policy in policies if policy != ReasoningPolicy.STRIPPED_EVERYWHERE)
    return next(known, ReasoningPolicy.STRIPPED_EVERYWHERE)


def _policy_for_chat(template: ChatTemplate, messages: list[Message]) -> ReasoningPolicy:
    adapted = [as_read(message, template).context for message in messages]
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    trained = {k: as_read(messages[k], template).trained for k in turns}
    own = [word in template.render([*adapted[:k], trained[k]]) for k, word in zip(turns, _REASONINGS, strict=True)]
    history = template.render([*adapted, {"role": "user", "content": "Oak"}], add_generation_prompt=True)
    remembered = [word in history for word in _REASONINGS]
    if not any(own):
        return ReasoningPolicy.STRIPPED_EVERYWHERE
    if all(own) and all(remembered):
        return ReasoningPolicy.KEPT
    return ReasoningPolicy.MIXED if any(remembered) or not all(own) else ReasoningPolicy.STRIPPED


def _make_chat(answer_with: Callable[[str], Message]) -> list[Message]:
    pairs = zip(_QUESTIONS, _REASONINGS, strict=True)
    return [
        message
        for question, reasoning in pairs
        for message in ({"role": "user", "content": question}, {"role": "assistant", **answer_with(reasoning)})
    ]


def _under_key(reasoning: str) -> Message:
    return {"reasoning_content": reasoning, "content": _ANSWER}


def _inline(reasoning: str) -> Message:
    return {"content": f"<think>\n{reasoning}\n</think>\n\n{_ANSWER}"}


def _endings(template: ChatTemplate) -> tuple[str, str]:
    messages = [{"role": "user", "content": "Juniper"}, {"role": "assistant", "content": _ANSWER}]
    following = {"role": "user", "content": "Oak"}
    last = template.render(messages).rpartition(_ANSWER)[2].strip()
    history = template.render([*messages, following]).rpartition(_ANSWER)[2].partition("Oak")[0]
    token = _added_stop(template) or last
    # Of the text after the answer in history, only what ends the answer: the rest begins the next message.
    return last, token if history.lstrip().startswith(token) else _first_token(template, history.lstrip())


def _added_stop(template: ChatTemplate) -> str:
    ending = get_behaviour(template).answers.ending
    return (ending.trained or "").removeprefix(ending.written).strip()


def _first_token(template: ChatTemplate, text: str) -> str:
    tokens = sorted(template.tokenizer.get_added_vocab(), key=len, reverse=True)
    return next((token for token in tokens if text.startswith(token)), "")
