"""How messages end under a chat template, and the stop token with which a completion ends."""

import re
from dataclasses import dataclass

from .conversation import Message, RenderingError
from .probes import ANSWER, REASONING, USER, VALUE, answer, render_probe
from .reasoning import REASONING_KEYS
from .template import ChatTemplate
from .tokenization import split_markup


# Special tokens that close a part of a message rather than the message.
_CLOSES_A_PART = re.compile("^</|^\\[/|[_\u2581]end[|\uff5c]>$|^<[a-z_]+\\|>$")


@dataclass(frozen=True, slots=True)
class Ending:
    """
    How a message ends.

    Args:
        written (`str`):
            What the template writes at the end of a conversation's last message.
        trained (`str`, *optional*):
            What replaces it in a completion: the same text, plus a stop token if the template writes none, minus the
            next message's header if it writes that. `None` if there is no token to stop at.
    """

    written: str
    trained: str | None


def find_ending(template: ChatTemplate, message: Message, following: Message, last_word: str) -> Ending:
    """Return how a message ends whose last word is given; unchanged if the template does not render the word."""
    text = render_probe(template, USER, message)
    _, found, rest = text.rpartition(last_word)
    if not found:
        return Ending("", "")
    calls = last_word == VALUE
    written = _trailing_markup(template, rest) if calls else rest
    eos: str | None = template.tokenizer.eos_token
    if eos and eos in written:  # what follows it begins the next message, but for white space
        start, _, after = written.partition(eos)
        return Ending(written, start + eos + (after if not after.strip() else ""))
    stop = _without_header(template, written)
    last = _pieces(template, stop.strip())[-1:]
    if last and _closes_reasoning(template, last[0]):  # then the model goes on after it: gpt-oss writes such histories
        return Ending(written, stop.rstrip().removesuffix(last[0]) + eos if eos else None)
    if _is_stop(template, last[0]) if calls and last else last:
        return Ending(written, stop)
    token = _next_token(template, message, following)
    return Ending(written, None if token is None else stop + token)


def _is_stop(template: ChatTemplate, token: str) -> bool:
    """Whether a model stops at a token that the template writes behind tool calls."""
    ending = render_probe(template, USER, answer()).rpartition(ANSWER)[2].strip()
    known = template.tokenizer.added_tokens_decoder.values()
    special = {added.content for added in known if added.special and not _CLOSES_A_PART.search(added.content)}
    return token in special or bool(ending and ending.endswith(token))


def _closes_reasoning(template: ChatTemplate, token: str) -> bool:
    """Whether a token that ends an answer also stands between its reasoning and the answer."""
    reasoning = dict.fromkeys(REASONING_KEYS, REASONING)
    _, found, after = render_probe(template, USER, answer(**reasoning)).rpartition(REASONING)
    return bool(found) and token in after.partition(ANSWER)[0]


def _without_header(template: ChatTemplate, ending: str) -> str:
    """Drop the header of the next answer, which some templates write whether or not it was requested."""
    bare = render_probe(template, USER)
    if not bare or bare != render_probe(template, USER, add_generation_prompt=True):
        return ending
    own, header = _pieces(template, ending), _pieces(template, bare.rpartition(str(USER["content"]))[2])
    while own and header and own[-1] == header[-1]:
        own.pop()
        header.pop()
    return "".join(own)


def _trailing_markup(template: ChatTemplate, text: str) -> str:
    pieces, added = _pieces(template, text), template.tokenizer.get_added_vocab()
    is_text = [bool(piece.strip()) and piece not in added and piece[:1] not in ("<", "[") for piece in pieces]
    return "".join(pieces[max((i + 1 for i, text in enumerate(is_text) if text), default=0) :])


def _pieces(template: ChatTemplate, text: str) -> list[str]:
    return split_markup(text, template.tokenizer)


def _next_token(template: ChatTemplate, message: Message, following: Message) -> str | None:
    """The token that history shows after a message, or else EOS."""
    last, history = render_probe(template, USER, message), render_probe(template, USER, message, following)
    rest = history[len(last) :].lstrip() if history.startswith(last) else ""
    tokens = sorted(template.tokenizer.get_added_vocab(), key=len, reverse=True)
    eos: str | None = template.tokenizer.eos_token
    return next((token for token in tokens if rest.startswith(token)), eos)


def end_with_stop_token(completion: str, ending: Ending, template: ChatTemplate) -> str:
    """
    Return a completion that ends as the model ends it.

    Raises:
        `RenderingError`: If there is no token to stop at.
    """
    if ending.trained is None:
        raise RenderingError(
            "the chat template writes no stop token after it and the tokenizer has no EOS token, so the model "
            "would never learn to stop. Set tokenizer.eos_token."
        )
    if completion.endswith(ending.written):
        return completion.removesuffix(ending.written) + ending.trained
    tokens = [token.content for token in template.tokenizer.added_tokens_decoder.values() if token.special]
    ends = completion.rstrip().endswith((ending.trained.strip(), *tokens))
    if ends:
        return completion
    # A call without arguments may end in less markup than the ending was measured on, and lacks the stop token alone.
    added = ending.trained.removeprefix(ending.written)
    return completion + (added or ending.trained)
