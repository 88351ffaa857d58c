"""One turn: the prompt as it is served, and the completion that the model generates after it."""

import re
from dataclasses import dataclass
from functools import cached_property

from ..trees.sample import CompletionKind
from .checks import (
    find_fault,
    foreign_words,
    made_numbers,
    missing_content,
    missing_reasoning,
    own_strings,
    template_name,
)
from .completion_from_template import MarkedMessage, OwnText, isolate, mark_message
from .conversation import Message, RenderingError
from .message_format import as_read, parse, with_content_as_read
from .prefixes import Prefixes
from .reasoning import KNOWN_TAGS, THINK, ParsedMessage, is_reasoning_part, without_reasoning, write_reasoning
from .stop_tokens import end_with_stop_token
from .template import ChatTemplate
from .template_behaviour import get_behaviour


_NO_PLACE = (
    "its prompt closes the reasoning before the message can give its own. Switch thinking on through "
    "'chat_template_kwargs', remove the reasoning, or use a template that renders it"
)
# Tags of templates that are not known, such as those of MiniMax-M3.
_OTHER_OPENING, _OTHER_CLOSING = r"<[^<>/\s]*think[^<>\s]*>", r"</[^<>\s]*think[^<>\s]*>"
# Placeholders for what a turn lacks, to see what the template writes around it.
_NO_REASONING, _NO_ANSWER = "Xqthoughtqx", "Xqemptyqx"


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """
    Text of one turn.

    `prompt` holds the messages before it with the generation prompt, as served; `completion` what the model generates
    after that, up to and including its stop token. `reasoning_end` is the length in characters of the reasoning that
    starts the completion, closing tag included. `stop_added` says whether the template writes no stop token there,
    `has_empty_block` whether the completion begins with an empty block of reasoning.
    """

    message_index: int
    prompt: str
    completion: str
    reasoning_end: int
    parsed: ParsedMessage
    kind: CompletionKind
    stop_added: bool
    has_empty_block: bool


def render_turn(prefixes: Prefixes, k: int) -> RenderedTurn:
    """
    Render the turn whose assistant message is at position `k`.

    It is refused if the template refuses the messages, or the completion cannot be told from the rest with certainty,
    or lacks something that the message says.
    """
    try:
        return _TurnRenderer(prefixes, k).turn()
    except RenderingError as error:
        raise rendering_error(prefixes.template, k, str(error)) from error


def rendering_error(template: ChatTemplate, k: int, reason: str) -> RenderingError:
    """Return the error for message `k`, which names the template."""
    name = template_name(template.tokenizer, template.source)
    return RenderingError(f"Message {k} cannot be rendered with the {name}: {reason.removesuffix('.')}.")


class _TurnRenderer:
    def __init__(self, prefixes: Prefixes, k: int) -> None:
        self.prefixes, self.k, self.template = prefixes, k, prefixes.template
        self.message: Message = prefixes.trained.get(k, prefixes.messages[k])
        self.behaviour = get_behaviour(self.template)
        self.parsed = parse(self.message, self.template)

    @cached_property
    def prompt(self) -> str:
        return self.prefixes.prompt(self.k)

    @cached_property
    def marked(self) -> MarkedMessage:
        return mark_message(self.message, self.parsed)

    @cached_property
    def marked_own(self) -> OwnText:
        return self.own_text(self.marked.message)

    def turn(self) -> RenderedTurn:
        if fault := find_fault(self.parsed):
            raise RenderingError(fault)
        if self.template.is_random and self.prefixes.through(self.k) != self.prefixes.through(
            self.k, dict(self.message)
        ):
            raise RenderingError(
                "the template makes up random text for it, such as ids of calls: give each call an 'id'"
            )
        completion, reasoning_start, kind = self.completion()
        reasoning_end = self.reasoning_end(completion, reasoning_start)
        shape = self.behaviour.calls if self.parsed.calls else self.behaviour.answers
        ended = end_with_stop_token(completion, shape.ending, self.behaviour.stops, self.template)
        self.check(ended, reasoning_start)
        return RenderedTurn(
            self.k,
            self.prompt,
            ended,
            reasoning_end,
            self.parsed,
            kind,
            len(ended.rstrip()) > len(completion.rstrip()),
            not self.parsed.reasoning and self.empty_block.match(completion) is not None,
        )

    def completion(self) -> tuple[str, int, CompletionKind]:
        """Return the completion, the position of its reasoning (-1 if there is none), and how it came about."""
        own = self.own_text(self.message)
        if self.parsed.reasoning and not self.shows(own.text, self.parsed.reasoning, self.marked.reasoning):
            return *self.with_reasoning(), CompletionKind.REASONING_RESTORED
        if own.opening.strip():
            return *self.after_opening(own), CompletionKind.OPENING_CONTINUED
        start = self.find_reasoning(own)
        if own.opening:  # the prompt ends in white space that the rendering lacks
            start -= min(len(own.text) - len(own.text.lstrip()), max(start, 0))
        text = own.text.lstrip() if own.opening else own.text
        kind = CompletionKind.AS_SERVED if own.start is None else CompletionKind.HISTORY_REWRITTEN
        return text, start, kind

    def own_text(self, message: Message) -> OwnText:
        whole = self.prefixes.through(self.k, message)
        if whole.startswith(self.prompt):
            return OwnText(whole[len(self.prompt) :])
        if self.prompt.startswith(whole) and not self.prompt[len(whole) :].strip():
            return OwnText("")  # some templates write nothing at all for an empty message
        parsed = parse(message, self.template)
        if not parsed.answer.strip() and not parsed.calls:  # some templates drop more than an empty answer
            shown = self.own_text(self.with_answer(message, parsed))
            return OwnText(shown.text.replace(_NO_ANSWER, "", 1), shown.opening, shown.start)
        marked = mark_message(message, parsed)
        own = isolate(self.prefixes, self.k, whole, marked)
        if own is None:
            missing = missing_content(self.message, self.parsed, "", self.template.source, self.with_call_ids)
            raise RenderingError(missing or missing_reasoning(self.template.source))
        return own

    def with_answer(self, message: Message, parsed: ParsedMessage) -> Message:
        """Return a message with a placeholder in the place of its empty answer."""
        content = message.get("content")
        if isinstance(content, list):
            return {**message, "content": [*filter(is_reasoning_part, content), {"type": "text", "text": _NO_ANSWER}]}
        content = str(content).removesuffix(parsed.answer) + _NO_ANSWER if parsed.inline else _NO_ANSWER
        return with_content_as_read({**message, "content": content}, self.behaviour)

    @cached_property
    def own_strings(self) -> list[str]:
        return own_strings(self.message)

    def shows(self, text: str, part: str, marker: str) -> bool:
        """Whether a text holds this part of the message, rather than markup or another part with the same words."""
        if part.strip() not in text:
            return False
        return not self.is_ambiguous(part.strip()) or marker in self.marked_own.text

    def is_ambiguous(self, part: str) -> bool:
        others = [text for text in self.own_strings if text.strip() != part]
        return (
            part in self.template.markup
            or (part in self.parsed.reasoning and part in self.parsed.answer)
            or any(part in text for text in others if text not in (self.parsed.reasoning, self.message.get("content")))
        )

    def find_reasoning(self, own: OwnText) -> int:
        if not self.parsed.reasoning:
            return -1
        if self.is_ambiguous(self.parsed.reasoning):
            return self.marked_own.text.find(self.marked.reasoning)
        return own.text.find(self.parsed.reasoning)

    def with_reasoning(self) -> tuple[str, int]:
        """Write the reasoning that the template leaves out, the way the prompt and the template show."""
        tags, reasoning = self.template.tags, self.parsed.reasoning
        if tags is None:
            raise RenderingError(missing_reasoning(self.template.source))
        if self.prompt.rstrip().endswith(tags.closing):
            raise RenderingError(_NO_PLACE)
        bare = self.own_text(without_reasoning(self.message, self.parsed))
        if bare.opening.strip() not in ("", tags.opening):
            raise RenderingError(missing_reasoning(self.template.source))
        return write_reasoning(self.prompt, bare.text, reasoning, tags, self.reasoning_on_own_lines)

    @property
    def reasoning_on_own_lines(self) -> bool:
        tags = self.template.tags
        assert tags is not None
        if tags.own_lines is not None:
            return tags.own_lines
        return any(tags.opening + newline in self.template.source for newline in ("\n", "\\n"))

    def after_opening(self, own: OwnText) -> tuple[str, int]:
        """Continue a prompt that starts the answer with text that the template does not write for this message."""
        assert own.start is not None
        head, rest = own.text[: own.start].strip(), own.text[own.start :]
        is_closed = any(tags.closing in own.opening for tags in KNOWN_TAGS)
        if self.parsed.reasoning:
            if is_closed or head:
                raise RenderingError(_NO_PLACE)
            return rest, len(rest) - len(rest.lstrip())
        if is_closed:
            return self.without_empty_block(own.text), -1
        return self.close_reasoning(own), -1

    def without_empty_block(self, text: str) -> str:
        """Drop the empty block that the template writes in place of reasoning: the prompt already has one."""
        text = self.empty_block.sub("", text, count=1)
        return text.lstrip() if self.prompt[-1:].isspace() else text

    @property
    def empty_block(self) -> re.Pattern[str]:
        tags = self.template.tags or THINK
        opening, closing = re.escape(tags.opening), re.escape(tags.closing)
        return re.compile(rf"\A\s*(?:(?:{opening}|{_OTHER_OPENING})\s*)?(?:{closing}|{_OTHER_CLOSING})\s*")

    def close_reasoning(self, own: OwnText) -> str:
        """Close the reasoning that the prompt opens for a message without reasoning, as the model would."""
        with_one = as_read({**self.message, "reasoning_content": _NO_REASONING}, self.template).trained
        text = self.own_text(with_one).text
        head, found, rest = text.partition(_NO_REASONING)
        if found and not head.strip():
            return rest
        tags = self.template.tags
        if tags is None or not self.prompt.rstrip().endswith(tags.opening):
            raise RenderingError(_not_continued(own.opening, head.strip()))
        return write_reasoning(self.prompt, own.text, "", tags, self.reasoning_on_own_lines)[0]

    def reasoning_end(self, completion: str, start: int) -> int:
        if start < 0:
            return 0
        end = start + len(self.parsed.reasoning)
        tag = len(completion) - len(completion[end:].lstrip())
        # gpt-oss closes reasoning by a special token that closes other parts as well: it has no tag of its own.
        tags = [self.template.tags.closing] if self.template.tags else []
        closing = [*tags, *self.template.borders.tokens]
        tag_end = next((tag + len(text) for text in closing if completion.startswith(text, tag)), end)
        other = re.compile(_OTHER_CLOSING).match(completion, tag)
        return other.end() if other and tag_end == end else tag_end

    def with_call_ids(self) -> str:
        """Return what the template writes if each call has an id with the tool's name in it."""
        ids = [f"functions.{call.get('name')}:{index}" for index, call in enumerate(self.parsed.calls)]
        calls = [{**call, "id": id_} for call, id_ in zip(self.message["tool_calls"], ids, strict=True)]
        try:
            return self.prefixes.through(self.k, {**self.message, "tool_calls": calls}).removeprefix(self.prompt)
        except RenderingError:  # ids are no way out
            return ""

    def check(self, completion: str, reasoning_start: int) -> None:
        rest, tags = completion, self.template.tags
        if tags is not None and tags.closing in completion[: max(reasoning_start, 0)]:
            raise RenderingError(_NO_PLACE)
        if reasoning_start >= 0:
            end = reasoning_start + len(self.parsed.reasoning)
            rest = f"{completion[:reasoning_start]} {completion[end:]}"
        missing = missing_content(self.message, self.parsed, rest, self.template.source, self.with_call_ids)
        parts = [] if isinstance(self.message.get("content"), list) else [(self.parsed.answer, self.marked.answers[0])]
        parts += [
            (str(call.get("name")), name) for call, name in zip(self.parsed.calls, self.marked.names, strict=True)
        ]
        hidden = [part for part, marker in parts if part.strip() and not self.shows(rest, part, marker)]
        if missing or hidden:
            raise RenderingError(missing or f"its text {hidden[0]!r} is lost")
        if self.behaviour.counts_back and made_numbers(completion, self.message, self.template.borders.added_tokens):
            raise RenderingError(
                "the template numbers messages from the end of the conversation, and the model would learn a number "
                "that changes. Use a template without it"
            )
        foreign = foreign_words(self.prefixes, self.k, completion)
        if foreign:
            words = ", ".join(map(repr, foreign[:3]))
            raise RenderingError(
                f"its completion holds words of other messages ({words}), which the model does not write"
            )


def _not_continued(opening: str, head: str) -> str:
    written = f"writes {head!r}" if head else "goes on"
    return (
        f"its prompt begins the answer with {opening.strip()!r}, and the template {written} for a message like this: "
        "what the model would generate is not certain. Arguments in 'chat_template_kwargs' (such as enable_thinking) "
        "may make them agree"
    )
