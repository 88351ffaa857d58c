"""Renderings of all beginnings of a conversation, with what they have in common prepared once."""

from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any

from jinja2 import Template, TemplateError

from .conversation import Conversation, Message
from .reasoning import without_reasoning
from .sandbox import compiled_template
from .template import ChatTemplate


# Ways of calling templates of which all renderings of a conversation were compared with `apply_chat_template`.
_compared: dict[tuple[str, bool, frozenset[str]], bool] = {}
_ALWAYS_SEEN = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class Prefixes:
    """
    The beginnings of a conversation, as a chat template renders them.

    `apply_chat_template` copies all messages and runs the template in a slow sandbox, for each beginning anew. Here,
    transformers prepares the messages once, and the template runs in a [`RememberingSandbox`]. The text is the same:
    all renderings of the first conversation are compared with those of `apply_chat_template`, and the longest one of
    each conversation. Where one differs, or the template raises, `apply_chat_template` renders.

    Args:
        template ([`ChatTemplate`]):
            The template, with its arguments.
        messages (`list[dict]`):
            The conversation, in the form that the template reads.
        compiled (`jinja2.Template`, *optional*):
            The template in the fast sandbox; `None` to render through `apply_chat_template` alone.
        variables (`dict`):
            What the template sees of the whole conversation.
        compares (`bool`):
            Whether to compare each rendering.
        known (`dict`):
            The renderings made so far, by number of messages and whether a generation prompt follows.
    """

    template: ChatTemplate
    messages: list[Message]
    compiled: Template | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    compares: bool = False
    known: dict[tuple[int, bool], str] = field(default_factory=dict)

    @classmethod
    def of_conversation(
        cls, conversation: Conversation, tokenizer: Any, chat_template: str | None = None
    ) -> "Prefixes":
        """
        Prepare a conversation as it was read from a dataset row.

        Args:
            conversation ([`Conversation`]):
                The conversation.
            tokenizer (`PreTrainedTokenizerBase`):
                Tokenizer with a chat template.
            chat_template (`str`, *optional*):
                Template to use instead of the tokenizer's own.

        Returns:
            `Prefixes`: Its beginnings.
        """
        template = ChatTemplate.of(tokenizer, chat_template, conversation.tools, conversation.template_kwargs)
        adapted = [template.adapt(message) for message in conversation.messages]
        return cls.of(template, adapted, conversation.first_trained)

    @classmethod
    def of(cls, template: ChatTemplate, messages: list[Message], first_trained: int = 0) -> "Prefixes":
        """
        Prepare a conversation.

        Args:
            template ([`ChatTemplate`]):
                The template.
            messages (`list[dict]`):
                The conversation, in the form that the template reads.
            first_trained (`int`, *optional*, defaults to 0):
                Position of the first message that may be trained.

        Returns:
            `Prefixes`: Its beginnings.
        """
        slow = cls(template, messages)
        turns = [k for k, message in enumerate(messages) if message.get("role") == "assistant" and k >= first_trained]
        if len(turns) < 2 or not _is_stock(template):
            return slow
        way = template.source, bool(template.tools), frozenset(template.kwargs)
        compiled = compiled_template(template.full_source) if _compared.get(way, True) else None
        if compiled is None:
            return slow
        try:
            variables = _variables_of(template, messages)
            length = turns[-1] + 1
            longest = template.render(messages[:length])
            fast = cls(template, messages, compiled, variables, way not in _compared, {(length, False): longest})
            agrees = fast._fast(variables["messages"][:length], False) == longest
        except Exception:  # templates raise what they like; it comes up again where that rendering is asked for
            return slow
        _compared[way] = agrees
        return fast if agrees else slow

    def render(self, length: int, add_generation_prompt: bool = False, last: Message | None = None) -> str:
        """
        Return the text of a beginning.

        Args:
            length (`int`):
                Its number of messages.
            add_generation_prompt (`bool`, *optional*, defaults to `False`):
                Whether the template begins an answer.
            last (`dict`, *optional*):
                Message to put in place of its last one.

        Raises:
            `Exception`: What the template raises.
        """
        if last is not None:
            return self._rendered([*self.messages[: length - 1], last], add_generation_prompt, last)
        key = length, add_generation_prompt
        if key not in self.known:
            self.known[key] = self._rendered(self.messages[:length], add_generation_prompt)
        return self.known[key]

    def add_reasoning(self, length: int, prompt: str) -> str | None:
        """Return the rendering of a beginning with the reasoning that the template leaves out of its last message."""
        if self.template.tags is None:
            return None
        last = self.messages[length - 1]
        said = self.template.spoken(last)
        return self.template.add_reasoning(prompt, self.render(length, last=without_reasoning(last, said)), said)

    def _rendered(self, messages: list[Message], add_generation_prompt: bool, last: Message | None = None) -> str:
        if self.compiled is None:
            return self.template.render(messages, add_generation_prompt)
        try:
            prepared = self.variables["messages"][: len(messages)]
            if last is not None:
                prepared[-1:] = _variables_of(self.template, [last])["messages"]
            text = self._fast(prepared, add_generation_prompt)
        except Exception:  # the same comes out of `apply_chat_template`, or nothing does
            return self.template.render(messages, add_generation_prompt)
        return self._compared(text, messages, add_generation_prompt) if self.compares else text

    def _fast(self, messages: list[Message], add_generation_prompt: bool) -> str:
        assert self.compiled is not None
        return self.compiled.render(
            {**self.variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        )

    def _compared(self, text: str, messages: list[Message], add_generation_prompt: bool) -> str:
        expected = self.template.render(messages, add_generation_prompt)
        if text != expected:
            _compared[self.template.source, bool(self.template.tools), frozenset(self.template.kwargs)] = False
        return expected


def _is_stock(template: ChatTemplate) -> bool:
    """Whether a template is called by transformers' own code, and all arguments are variables that it sees."""
    from transformers import PreTrainedTokenizerBase

    method = getattr(template.tokenizer.apply_chat_template, "__func__", None)
    if method is not PreTrainedTokenizerBase.apply_chat_template:
        return False
    return all(name.isidentifier() and name not in _parameters_of(method) for name in template.kwargs)


@cache
def _parameters_of(function: Any) -> frozenset[str]:
    return frozenset(signature(function).parameters)


def _variables_of(template: ChatTemplate, messages: list[Message]) -> dict[str, Any]:
    """What transformers lets a template see, as told by a template that raises it."""
    names = dict.fromkeys([*_ALWAYS_SEEN, *template.tokenizer.special_tokens_map, *template.arguments])
    teller = "{{ raise_exception({" + ", ".join(f"'{name}': {name}" for name in names) + "}) }}"
    try:
        template.tokenizer.apply_chat_template(
            messages, tools=template.tools, chat_template=teller, tokenize=False, **template.arguments
        )
    except TemplateError as error:
        seen: dict[str, Any] = error.args[0]
        return seen
    raise AssertionError("raise_exception raises")
