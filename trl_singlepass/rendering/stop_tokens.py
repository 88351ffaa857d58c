"""How messages end under a chat template, and the stop token with which a completion ends."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .conversation import Message, RenderingError
from .probes import ANSWER, USER, VALUE, Probe
from .template import ChatTemplate
from .tokenization import split_markup


# Special tokens that close a part of a message rather than the message.
_CLOSES_A_PART = re.compile("^</|^\\[/|[_\u2581]end[|\uff5c]>$|^<[a-z_]+\\|>$")


@dataclass(frozen=True, slots=True)
class Ending:
    """
    What a template writes at the end of a conversation's last message, and what replaces it in a completion.

    `trained` is the same text, plus a stop token if the template writes none, minus the next message's header if it
    writes that; `None` if there is no token to stop at.
    """

    written: str
    trained: str | None


def find_ending(probe: Probe, message: Message, following: Message, last_word: str, within: frozenset[str]) -> Ending:
    """
    Return how a message ends whose last word is given; unchanged if the template does not render the word.

    Tokens `within` messages stand between reasoning and answer: the model goes on after them.
    """
    text, template = probe.render(probe.user, message), probe.template
    _, found, rest = text.rpartition(last_word)
    if not found:
        return Ending("", "")
    calls = last_word == VALUE
    written = _trailing_markup(template, rest) if calls else rest
    eos: str | None = template.tokenizer.eos_token
    if eos and eos in written:  # what follows it begins the next message, but for white space
        start, _, after = written.partition(eos)
        return Ending(written, start + eos + (after if not after.strip() else ""))
    stop = _without_header(probe, written)
    last = split_markup(stop.strip(), template.tokenizer)[-1:]
    if last and last[0] in within:  # gpt-oss writes such histories
        trained = stop.rstrip().removesuffix(last[0]) + eos if eos else None
        return Ending(written, trained)
    if _is_stop(probe, last[0]) if calls and last else last:
        return Ending(written, stop)
    token = _next_token(probe, message, following)
    return Ending(written, None if token is None else stop + token)


def _is_stop(probe: Probe, token: str) -> bool:
    """Whether a model stops at a token that the template writes behind tool calls."""
    ending = probe.render(probe.user, probe.answer()).rpartition(ANSWER)[2].strip()
    return token in _message_ends(probe.template) or bool(ending and ending.endswith(token))


def _message_ends(template: ChatTemplate) -> set[str]:
    known = template.tokenizer.added_tokens_decoder.values()
    return {added.content for added in known if added.special and not _CLOSES_A_PART.search(added.content)}


def _without_header(probe: Probe, ending: str) -> str:
    """Drop the header of the next answer, which some templates write whether or not it was requested."""
    bare = probe.render(probe.user)
    if not bare or bare != probe.render(probe.user, add_generation_prompt=True):
        return ending
    tokenizer = probe.template.tokenizer
    own, header = split_markup(ending, tokenizer), split_markup(bare.rpartition(USER)[2], tokenizer)
    while own and header and own[-1] == header[-1]:
        own.pop()
        header.pop()
    return "".join(own)


def _trailing_markup(template: ChatTemplate, text: str) -> str:
    pieces, added = split_markup(text, template.tokenizer), template.borders.added_tokens
    is_text = [bool(piece.strip()) and piece not in added and piece[:1] not in ("<", "[") for piece in pieces]
    return "".join(pieces[max((i + 1 for i, text in enumerate(is_text) if text), default=0) :])


def _next_token(probe: Probe, message: Message, following: Message) -> str | None:
    """The token that history shows after a message, or else EOS."""
    last, history = probe.render(probe.user, message), probe.render(probe.user, message, following)
    rest = history[len(last) :].lstrip() if history.startswith(last) else ""
    eos: str | None = probe.template.tokenizer.eos_token
    return next((token for token in probe.template.borders.added_tokens if rest.startswith(token)), eos)


def find_stops(template: ChatTemplate, endings: Iterable[Ending], within: frozenset[str]) -> frozenset[str]:
    """Return the tokens at which a completion may end: those of `endings`, and special ones that close no part."""
    trained = ((ending.trained or "").strip() for ending in endings)
    last = {piece for text in trained for piece in split_markup(text, template.tokenizer)[-1:]}
    return frozenset(_message_ends(template) - within | last)


def end_with_stop_token(completion: str, ending: Ending, stops: frozenset[str], template: ChatTemplate) -> str:
    """
    Return a completion that ends as the model ends it, or raise `RenderingError` if there is no token to stop at.
    """
    if ending.trained is None:
        raise RenderingError(
            "the chat template writes no stop token after it and the tokenizer has no EOS token, so the model "
            "would never learn to stop. Set tokenizer.eos_token."
        )
    if completion.endswith(ending.written):
        return completion.removesuffix(ending.written) + ending.trained
    if completion.rstrip().endswith((ending.trained.strip(), *stops)):
        return completion
    # A call without arguments may end in less markup than the ending was measured on, and lacks the stop token alone;
    # reasoning without an answer may be closed by the token with which an ending of two tokens begins.
    added = ending.trained.removeprefix(ending.written)
    first, *others = split_markup(ending.trained, template.tokenizer)
    if not added and others and completion.rstrip().endswith(first):
        return completion.rstrip() + "".join(others)
    return completion + (added or ending.trained)
