"""What a chat template does with reasoning and with the ends of messages, measured by rendering a small chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...rendering.checks import template_name
from ...rendering.conversation import Conversation, Message
from ...rendering.message_format import as_context, as_trained
from ...rendering.template import ChatTemplate
from ...rendering.traits import get_traits


# Words that no template writes itself.
_QUESTIONS, _ANSWER = ("Juniper", "Linden", "Maple", "Cedar"), "Aspen"
_REASONINGS = ("Rowan", "Hazel", "Birch", "Alder")

STRIPPED, KEPT, STRIPPED_EVERYWHERE = "stripped", "kept", "stripped from every turn"
MIXED, REFUSED = "mixed", "refuses a plain chat"


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """
    What a chat template does, as it is called in a dataset.

    Args:
        name (`str`):
            What to call the template.
        kind (`str`):
            What becomes of reasoning: `"stripped"` (from all turns but the last), `"kept"`, `"stripped from every
            turn"` (the last one too), `"mixed"` (kept in some earlier turns), or `"refuses a plain chat"`.
        last_ending (`str`):
            What the template writes after the last answer of a conversation.
        history_ending (`str`):
            What it writes after the same answer once another message follows.
        added_stop (`str`):
            Stop token that is added to a last answer because the template writes none.
    """

    name: str
    kind: str
    last_ending: str
    history_ending: str
    added_stop: str


class TemplateSurvey:
    """
    Measures each way in which a dataset calls its template once.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with the chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, TemplateFacts] = {}

    def facts(self, conversation: Conversation) -> TemplateFacts:
        """Return what the template does under the arguments of a conversation."""
        # Some templates keep more reasoning when there are tools; which tools these are does not matter.
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
        return TemplateFacts(name, _kind(template), last, history, _added_stop(template))
    except Exception:  # templates raise what they like, and some take no plain chat
        return TemplateFacts(name, REFUSED, "", "", "")


def _kind(template: ChatTemplate) -> str:
    kinds = [_kind_of(template, _chat(reasoning)) for reasoning in (_under_key, _inline)]
    return next((kind for kind in kinds if kind != STRIPPED_EVERYWHERE), STRIPPED_EVERYWHERE)


def _kind_of(template: ChatTemplate, messages: list[Message]) -> str:
    adapted = [as_context(message, template) for message in messages]
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    trained = {k: as_trained(messages[k], template) for k in turns}
    own = [word in template.render([*adapted[:k], trained[k]]) for k, word in zip(turns, _REASONINGS, strict=True)]
    history = template.render([*adapted, {"role": "user", "content": "Oak"}], add_generation_prompt=True)
    remembered = [word in history for word in _REASONINGS]
    if not any(own):
        return STRIPPED_EVERYWHERE
    if all(own) and all(remembered):
        return KEPT
    return MIXED if any(remembered) or not all(own) else STRIPPED


def _chat(assistant: Any) -> list[Message]:
    pairs = zip(_QUESTIONS, _REASONINGS, strict=True)
    return [
        message
        for question, reasoning in pairs
        for message in ({"role": "user", "content": question}, {"role": "assistant", **assistant(reasoning)})
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
    # Of what follows the answer in history, as much as ends it: the rest begins the next message.
    return last, token if history.lstrip().startswith(token) else _first_token(template, history.lstrip())


def _added_stop(template: ChatTemplate) -> str:
    ending = get_traits(template).answer_ending
    return (ending.trained or "").removeprefix(ending.written).strip()


def _first_token(template: ChatTemplate, text: str) -> str:
    tokens = sorted(template.tokenizer.get_added_vocab(), key=len, reverse=True)
    return next((token for token in tokens if text.startswith(token)), "")
