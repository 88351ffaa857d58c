"""Where a message begins in a rendering that does not continue its prompt."""

from dataclasses import dataclass

from .conversation import RenderingError
from .markers import CONTEXT_MARKER, MarkedMessage, mark_context
from .prefixes import Prefixes
from .reasoning import KNOWN_TAGS
from .tokenization import split_markup


_TAGS = tuple(text for tags in KNOWN_TAGS for text in (tags.opening, tags.closing))


@dataclass(frozen=True, slots=True)
class OwnText:
    """
    What a template writes for a message after its prompt.

    Args:
        text (`str`):
            The text, up to the end of the rendering.
        opening (`str`):
            End of the prompt that the template does not write before this message, such as a forced `<think>`.
        start (`int`, *optional*):
            Where the message's own words begin in the text, known only where the rendering does not continue the
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

    Args:
        prefixes ([`Prefixes`]):
            The conversation.
        k (`int`):
            Position of the message.
        rendering (`str`):
            The messages up to and including it.
        marked ([`MarkedMessage`]):
            The message with markers in place of its words.

    Returns:
        [`OwnText`] or `None`: The text; `None` if the template renders nothing of the message.

    Raises:
        `RenderingError`: If the message cannot be told from its context with certainty.
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
    markup = text[:begin].rpartition(CONTEXT_MARKER)[2]
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
    markup = prefixes.template.render(marked, add_generation_prompt=True).rpartition(CONTEXT_MARKER)[2]
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
