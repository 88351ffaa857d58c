"""A chat template as one conversation calls it: with its tools, its arguments, a frozen clock, in a fast sandbox."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import Environment, Template, TemplateSyntaxError
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .conversation import Message, RenderingError, Tools
from .reasoning import ReasoningTags, reasoning_tags
from .tokenization import HardBorders, hard_borders
from .validation import missing_parts


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TemplateKey: TypeAlias = tuple[str, str, int, str | None]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the tools and arguments of one conversation, all turns of which see the same time."""

    tokenizer: PreTrainedTokenizerBase
    source: str
    tools: Tools | None
    kwargs: dict[str, Any]
    now: datetime

    @classmethod
    def for_conversation(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        tools: Tools | None,
        kwargs: dict[str, Any],
        now: datetime | None = None,
    ) -> ChatTemplate:
        """Return the template that `tokenizer` uses for a conversation, with the clock stopped at `now`."""
        try:
            source = tokenizer.get_chat_template(chat_template, tools)
        except ValueError as error:
            raise RenderingError(
                f"The tokenizer has no chat template to render conversations with: {error}"
            ) from error
        return cls(tokenizer, source, tools, kwargs, now or datetime.now())

    @property
    def reads_clock(self) -> bool:
        """Whether the template prints the date or the time."""
        return "strftime_now" in self.source

    @property
    def is_random(self) -> bool:
        """Whether the template may write something else each time that it renders a conversation."""
        return re.search(r"\|\s*random\b|\blipsum\b", self.source) is not None

    @property
    def full_source(self) -> str:
        """The template, reading the frozen clock if it reads any."""
        return _FROZEN_CLOCK + self.source if self.reads_clock else self.source

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All further arguments that the template is called with."""
        return {"frozen_clock": freeze(self.now), **self.kwargs} if self.reads_clock else self.kwargs

    @cached_property
    def tags(self) -> ReasoningTags | None:
        """Tags that the template knows around reasoning."""
        return reasoning_tags(self.source)

    @cached_property
    def key(self) -> TemplateKey:
        """What the template's behaviour depends on, beside the rules of the tokenizer."""
        # Some templates keep more reasoning when there are tools.
        arguments = json.dumps([self.kwargs, bool(self.tools)], sort_keys=True, default=repr)
        return self.source, arguments, len(self.tokenizer), self.tokenizer.eos_token

    @cached_property
    def borders(self) -> HardBorders:
        """Tokens of the template at which texts are cut before they are tokenised."""
        return hard_borders(self.tokenizer, self.source)

    @cached_property
    def markup(self) -> str:
        """The template's source, and all tokens that were added to the tokenizer's vocabulary."""
        return "\0".join([self.source, *self.borders.added_tokens])

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """
        Return the text of a conversation. Whatever the template raises to refuse the messages becomes a
        `RenderingError`.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                chat_template=self.full_source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.arguments,
            )
        except TemplateSyntaxError as error:
            raise RenderingError(
                f"the template is no valid Jinja, see its line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:  # templates may raise any exception, from TemplateError to TypeError
            missing = missing_parts(error, messages, self.tools)
            raise RenderingError(f"the template refuses the conversation up to it: {error!r}{missing}") from error
        return text


def with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """Return a tokenizer with another chat template, or the tokenizer itself if there is none to give it."""
    if chat_template is None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


# Directives of strftime: a template prints date and time through them, so they are what has to stand still. It may put
# a format together from parts, so all of them are frozen, not only those that it spells out.
_DIRECTIVES = [f"%{dash}{letter}" for letter in "aAbBcdDefFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ" for dash in ("-", "")]
# A macro of this name takes the place of transformers' function, which looks at the clock at every call. The newline
# after it is swallowed by `trim_blocks`, so the template itself begins at the start of a line.
_FROZEN_CLOCK = """{%- macro strftime_now(format) -%}
{%- set clock = namespace(text=format) -%}
{%- for directive, value in frozen_clock.items() -%}
{%- set clock.text = clock.text | replace(directive, value) -%}
{%- endfor -%}
{{- clock.text -}}
{%- endmacro %}
"""


def freeze(now: datetime) -> dict[str, str]:
    """Return the text of each strftime directive at a point in time: the value of `frozen_clock`."""
    return {directive: now.strftime(directive) for directive in _DIRECTIVES}


_OF_DICTS = frozenset(dir(dict))
_OF_LOOPS = ("index", "index0", "first", "last", "length", "revindex", "revindex0")
# As many as the arguments of calls in a conversation of a thousand turns.
_DICTS_KEPT = 4096
_PLAIN_TYPES = frozenset({bool, int, float, str, type(None), list, dict})


def _get_harmless_string_methods() -> frozenset[str]:
    """Methods of strings that the sandbox passes through: it decides by type and name, and wraps `format`."""
    sandbox = ImmutableSandboxedEnvironment()
    methods = {name: getattr("", name) for name in dir("") if not name.startswith("format")}
    return frozenset(name for name, method in methods.items() if sandbox.is_safe_attribute("", name, method))


_HARMLESS: dict[type, frozenset[str]] = {str: _get_harmless_string_methods(), LoopContext: frozenset(_OF_LOOPS)}


class CachingSandbox(ImmutableSandboxedEnvironment):
    """
    A sandbox that gives what `ImmutableSandboxedEnvironment` gives, faster on what templates do most.

    Templates spend most of their time looking up keys of messages, methods of strings, and fields of `loop` and
    `namespace`. For these exact types (not their subclasses), jinja's verdict depends on type and name alone.
    Everything else is left to jinja.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute of a value, or else its item, as the sandbox does."""
        kind = type(obj)
        if kind is dict:
            if attribute not in _OF_DICTS:
                return obj[attribute] if attribute in obj else _missing_key(self.undefined, attribute)  # type: ignore[arg-type]
        elif kind in _HARMLESS:
            if attribute in _HARMLESS[kind]:
                return getattr(obj, attribute)
        elif kind is self.globals["namespace"] and attribute[0] != "_":
            value = getattr(obj, attribute, self)
            if type(value) in _PLAIN_TYPES:
                return value
        return super().getattr(obj, attribute)

    # Both names as in jinja: what a template passes by keyword must not collide with them.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a value, as the sandbox does."""
        if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str:
            kwargs.pop("_block_vars", None)
            kwargs.pop("_loop_vars", None)
            return __obj(*args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _cached(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """
    Cache a filter's results for the most recent dicts, because tools are printed in every rendering: templates cannot
    change a dict, and nothing else holds the ones that they see.
    """
    made: dict[Any, tuple[Any, Any]] = {}

    def cached(value: object, *args: Any, **kwargs: Any) -> Any:
        if type(value) is not dict:
            return filter_(value, *args, **kwargs)
        key = id(value), args, *kwargs.items()
        if key not in made:
            made[key] = value, filter_(value, *args, **kwargs)  # the value is held, so that its id is not reused
            if len(made) > _DICTS_KEPT:
                del made[next(iter(made))]
        return made[key][1]

    return cached


@lru_cache
def _missing_key(undefined: type[Undefined], name: str) -> Undefined:
    """What a template gets for a key that a dict lacks. The dict itself stays hidden."""
    return undefined(obj={}, name=name)


@lru_cache
def compiled_template(source: str) -> Template | None:
    """
    Return a chat template in a [`CachingSandbox`] that is otherwise the environment of transformers.

    `None` if that is another sandbox than the one whose verdicts are cached.
    """
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # no public name: where it is gone, templates run through `apply_chat_template` alone
        return None
    environment: Environment = _compile_jinja_template(source).environment
    if type(environment) is not ImmutableSandboxedEnvironment:
        return None
    caching = CachingSandbox(
        trim_blocks=environment.trim_blocks,
        lstrip_blocks=environment.lstrip_blocks,
        extensions=[type(extension) for extension in environment.extensions.values()],
    )
    caching.filters = {**environment.filters, "tojson": _cached(environment.filters["tojson"])}
    caching.globals.update(environment.globals)
    return caching.from_string(source)
