"""One turn: the prompt as it is served, and the completion that the model generates after it."""

import re
from dataclasses import dataclass
from functools import cached_property

from ..trees.sample import CompletionKind
from .checks import foreign_words, missing_content, missing_reasoning, template_name
from .conversation import Message, RenderingError
from .isolation import OwnText, isolate
from .markers import MarkedMessage, mark_message, own_strings
from .message_format import as_trained, parse
from .prefixes import Prefixes
from .reasoning import KNOWN_TAGS, ParsedMessage, without_reasoning, write_reasoning
from .stop_tokens import end_with_stop_token
from .template import ChatTemplate
from .tokenization import hard_borders
from .traits import get_traits


_NO_PLACE = (
    "its prompt closes the reasoning before the message can give its own. Switch thinking on through "
    "'chat_template_kwargs', remove the reasoning, or use a template that renders it"
)
# Placeholder reasoning for a turn without any, to see how the template closes it.
_PLACEHOLDER = "Xqplaceholderqx"


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """
    Text of one turn.

    Args:
        message_index (`int`):
            Position of its assistant message.
        prompt (`str`):
            The messages before it with the generation prompt: what the model is served.
        completion (`str`):
            What the model generates after that, up to and including its stop token.
        reasoning_end (`int`):
            Length in characters of the reasoning that starts the completion, including its closing tag.
        parsed ([`ParsedMessage`]):
            What the message says.
        kind ([`CompletionKind`]):
            How the completion came about.
        stop_added (`bool`):
            Whether a stop token was added because the template writes none there.
    """

    message_index: int
    prompt: str
    completion: str
    reasoning_end: int
    parsed: ParsedMessage
    kind: CompletionKind
    stop_added: bool


def render_turn(prefixes: Prefixes, k: int) -> RenderedTurn:
    """
    Render one turn of a conversation.

    Args:
        prefixes ([`Prefixes`]):
            The conversation.
        k (`int`):
            Position of the turn's assistant message.

    Returns:
        [`RenderedTurn`]: The turn.

    Raises:
        `RenderingError`: If the template refuses the messages, or the completion cannot be told from the rest with
            certainty, or lacks something that the message says.
    """
    try:
        return _TurnRenderer(prefixes, k).turn()
    except RenderingError as error:
        raise rendering_error(prefixes.template, k, str(error)) from error


def rendering_error(template: ChatTemplate, k: int, reason: str) -> RenderingError:
    """Return the error for message `k`, which names the template."""
    name = template_name(template.tokenizer, template.source)
    return RenderingError(f"Message {k} cannot be rendered with the {name}: {reason.removesuffix('.')}.")


@dataclass(frozen=True)
class _TurnRenderer:
    prefixes: Prefixes
    k: int

    @property
    def template(self) -> ChatTemplate:
        return self.prefixes.template

    @cached_property
    def message(self) -> Message:
        return self.prefixes.trained.get(self.k, self.prefixes.messages[self.k])

    @cached_property
    def parsed(self) -> ParsedMessage:
        return parse(self.message, self.template)

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
        completion, reasoning_start, kind = self.completion()
        reasoning_end = self.reasoning_end(completion, reasoning_start)
        traits = get_traits(self.template)
        ending = traits.calls_ending if self.parsed.calls else traits.answer_ending
        ended = end_with_stop_token(completion, ending, self.template)
        self.check(ended, reasoning_start)
        return RenderedTurn(
            self.k,
            self.prompt,
            ended,
            reasoning_end,
            self.parsed,
            kind,
            len(ended.rstrip()) > len(completion.rstrip()),
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
        marked = mark_message(message, parse(message, self.template))
        own = isolate(self.prefixes, self.k, whole, marked)
        if own is None:
            missing = missing_content(self.message, self.parsed, "", self.template.source)
            raise RenderingError(missing or missing_reasoning(self.template.source))
        return own

    def shows(self, text: str, part: str, marker: str) -> bool:
        """Whether a text holds this part of the message, rather than markup or another part with the same words."""
        if part.strip() not in text:
            return False
        return not self.is_ambiguous(part.strip()) or marker in self.marked_own.text

    def is_ambiguous(self, part: str) -> bool:
        others = [text for text in own_strings(self.message) if text.strip() != part]
        return (
            part in self.template.source
            or any(part in token for token in self.template.tokenizer.get_added_vocab())
            or sum(part in text for text in (self.parsed.reasoning, self.parsed.answer)) > 1
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
            return rest, 0
        if is_closed:
            return self.without_empty_block(own.text), -1
        return self.close_reasoning(own), -1

    def without_empty_block(self, text: str) -> str:
        """Drop the empty block that the template writes in place of reasoning: the prompt already has one."""
        if self.template.tags is not None:
            opening, closing = re.escape(self.template.tags.opening), re.escape(self.template.tags.closing)
            text = re.sub(rf"\A\s*(?:{opening}\s*)?{closing}\s*", "", text)
        return text.lstrip() if self.prompt[-1:].isspace() else text

    def close_reasoning(self, own: OwnText) -> str:
        """Close the reasoning that the prompt opens for a message without reasoning, as the model would."""
        with_one = as_trained({**self.message, "reasoning_content": _PLACEHOLDER}, self.template)
        text = self.own_text(with_one).text
        head, found, rest = text.partition(_PLACEHOLDER)
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
        closing = [*tags, *hard_borders(self.template.tokenizer, self.template.source).tokens]
        return next((tag + len(text) for text in closing if completion.startswith(text, tag)), end)

    def check(self, completion: str, reasoning_start: int) -> None:
        rest = completion
        if reasoning_start >= 0:
            end = reasoning_start + len(self.parsed.reasoning)
            rest = f"{completion[:reasoning_start]} {completion[end:]}"
        missing = missing_content(self.message, self.parsed, rest, self.template.source)
        parts = [] if isinstance(self.message.get("content"), list) else [(self.parsed.answer, self.marked.answers[0])]
        parts += [
            (str(call.get("name")), name) for call, name in zip(self.parsed.calls, self.marked.names, strict=True)
        ]
        hidden = [part for part, marker in parts if part.strip() and not self.shows(rest, part, marker)]
        if missing or hidden:
            raise RenderingError(missing or f"its text {hidden[0]!r} is lost")
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
