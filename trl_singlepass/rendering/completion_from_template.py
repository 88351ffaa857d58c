"""
Where a message begins in a rendering that does not continue its prompt.

Markers in place of the words of messages show where a template puts each part of them.
"""

from dataclasses import dataclass
from typing import Any

from .conversation import Message, RenderingError
from .prefixes import Prefixes
from .reasoning import KNOWN_TAGS, REASONING_KEYS, ParsedMessage
from .tokenization import split_markup


# Words that no template and no conversation contains.
_CONTEXT, _REASONING, _ANSWER, _NAME = "Xqcontextqx", "Xqreasoningqx", "Xqanswer{}qx", "Xqname{}qx"
_TAGS = tuple(text for tags in KNOWN_TAGS for text in (tags.opening, tags.closing))


@dataclass(frozen=True, slots=True)
class MarkedMessage:
    """
    An assistant message of the same shape, and the markers in the place of its reasoning, of its content (one, or one
    for each part), and of the names of the functions that it calls.
    """

    message: Message
    reasoning: str
    answers: list[str]
    names: list[str]

    def find_first(self, text: str) -> int:
        """Return the position of the first marker in a text, -1 if it holds none."""
        found = [text.find(marker) for marker in (self.reasoning, *self.answers, *self.names)]
        return min((position for position in found if position >= 0), default=-1)


def mark_message(message: Message, parsed: ParsedMessage) -> MarkedMessage:
    """Return an assistant message, in the form that its template reads, with markers in place of its words."""
    marked = {
        key: _REASONING if key in REASONING_KEYS and _has_text(value) else value for key, value in message.items()
    }
    content, answers = message.get("content"), [_ANSWER.format(0)]
    if isinstance(content, list):
        answers = [_ANSWER.format(i) for i in range(len(content))]
        marked["content"] = [_mark_part(part, answer) for part, answer in zip(content, answers, strict=True)]
    elif parsed.inline:
        marked["content"] = _mark_inline(str(content), parsed)
    elif _has_text(content):
        marked["content"] = answers[0]
    names = [_NAME.format(i) for i in range(len(parsed.calls))]
    if names:
        marked["tool_calls"] = [
            _with_name(call, name) for call, name in zip(message["tool_calls"], names, strict=True)
        ]
    return MarkedMessage(marked, _REASONING, answers, names)


def mark_context(message: Message) -> Message:
    """Return a message with one marker in place of its content and of its reasoning."""
    marked = {
        key: _CONTEXT if key in ("content", *REASONING_KEYS) and _has_text(value) else value
        for key, value in message.items()
    }
    if isinstance(message.get("content"), list):
        marked["content"] = [_mark_part(part, _CONTEXT) for part in message["content"]]
    return marked


def _has_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _mark_part(part: Any, marker: str) -> Any:
    if isinstance(part, str):
        return marker if part.strip() else part
    marked = dict(part)
    for key in ("text", *REASONING_KEYS):
        if _has_text(marked.get(key)):
            marked[key] = marker if key == "text" or marker == _CONTEXT else _REASONING
        elif isinstance(marked.get(key), list):
            marked[key] = [_mark_part(item, marker if marker == _CONTEXT else _REASONING) for item in marked[key]]
    return marked


def _mark_inline(content: str, parsed: ParsedMessage) -> str:
    """Mark reasoning and answer where they stand, so that the tags between them stay as they are."""
    assert parsed.inline is not None
    start = content.index(parsed.inline.opening) + len(parsed.inline.opening)
    start += len(content[start:]) - len(content[start:].lstrip())
    between = content[start + len(parsed.reasoning) : len(content) - len(parsed.answer)]
    answer = parsed.answer.strip()
    marked = parsed.answer.replace(answer, _ANSWER.format(0), 1) if answer else parsed.answer
    return content[:start] + _REASONING + between + marked


def _with_name(call: dict[str, Any], marker: str) -> dict[str, Any]:
    """Mark the name of a called function, in the call's id as well: Kimi K2 prints `functions.get_weather:0` alone."""
    named = {**call, "function": {**call["function"], "name": marker}}
    is_named = isinstance(call.get("id"), str)
    return {**named, "id": call["id"].replace(call["function"]["name"], marker)} if is_named else named


@dataclass(frozen=True, slots=True)
class OwnText:
    """
    What a template writes for a message after its prompt, up to the end of the rendering.

    `opening` is the end of the prompt that the template does not write before this message, such as a forced
    `<think>`. `start` is where the message's own words begin, known only where the rendering does not continue the
    prompt.
    """

    text: str
    opening: str = ""
    start: int | None = None


def isolate(prefixes: Prefixes, k: int, rendering: str, marked: MarkedMessage) -> OwnText | None:
    """
    Find what a template writes for message `k` where its rendering does not continue the prompt.

    Some templates rewrite earlier messages once an answer is there: gpt-oss and Kimi-K2-Thinking drop the reasoning of
    the round. So the text behind the longest common prefix holds old calls and tool results as well. Rendered with
    markers in place of all words, the messages show the markup between the last word of the context and the first
    word of the message itself. Within that markup, the generation prompt is found again, and what follows it belongs
    to the message:

        prompt      … analysis <|message|>We look.<|end|> … <|message|>12 results<|end|><|start|>assistant
        rendering   … <|message|>12 results<|end|><|start|>assistant<|channel|>final<|message|>Twelve.<|return|>
        markup                             <|end|><|start|>assistant<|channel|>final<|message|>
        own text                                                    <|channel|>final<|message|>Twelve.<|return|>

    `None` if the template renders nothing of the message. It is refused where it cannot be told from its context with
    certainty.
    """
    own = prefixes.through(k, marked.message)
    begin = marked.find_first(own)
    if begin < 0:
        return None
    header = _generation_prompt(prefixes, k)
    markup = _markup_before(prefixes, k, marked, own[:begin], header)
    if markup is None or not rendering.startswith(own[:begin]):
        raise _uncertain("the template rewrites earlier messages, and where this one begins is not certain")
    position, length = _align(*(split_markup(text, prefixes.template.tokenizer) for text in (markup, header)))
    if not length and not header.lstrip().startswith(_TAGS):
        shown = f"the served generation prompt {header.strip()!r}" if header.strip() else "a generation prompt"
        raise _uncertain(f"the template does not write {shown} before this message")
    start = begin - len(markup) + position + length
    return OwnText(rendering[start:], header[length:], begin - start)


def _markup_before(prefixes: Prefixes, k: int, marked: MarkedMessage, before: str, header: str) -> str | None:
    """Markup that stands before the first word of message `k`: all of it belongs to the message, or its end does."""
    context = prefixes.prompt(k).removesuffix(header)
    if header and before.startswith(context):
        return before[len(context) :]
    marked_context = [mark_context(message) for message in prefixes.messages[:k]]
    text = prefixes.template.render([*marked_context, marked.message])
    begin = marked.find_first(text)
    markup = text[:begin].rpartition(_CONTEXT)[2]
    return markup if begin >= 0 and before.endswith(markup) else None


def _generation_prompt(prefixes: Prefixes, k: int) -> str:
    prompt = prefixes.prompt(k)
    try:
        context = prefixes.context(k)
    except RenderingError:  # some templates take no conversation that ends before an answer
        context = ""
    if context and prompt.startswith(context) and prompt != context:
        return prompt[len(context) :]
    # Written whether asked for or not: what follows the last word of the context.
    marked = [mark_context(message) for message in prefixes.messages[:k]]
    markup = prefixes.template.render(marked, add_generation_prompt=True).rpartition(_CONTEXT)[2]
    return markup if prompt.endswith(markup) else ""


def _align(markup: list[str], pieces: list[str]) -> tuple[int, int]:
    """Return where the longest beginning of a generation prompt stands in some markup, and how long it is."""
    best = 0, 0
    for first in range(len(markup)):
        shared = 0
        while first + shared < len(markup) and shared < len(pieces) and markup[first + shared] == pieces[shared]:
            shared += 1
        length = len("".join(pieces[:shared]))
        if length >= best[1] and "".join(pieces[:shared]).strip():
            best = len("".join(markup[:first])), length
    return best


def _uncertain(reason: str) -> RenderingError:
    return RenderingError(
        f"{reason}. Arguments in 'chat_template_kwargs' (such as enable_thinking) may make prompt and rendering agree"
    )
