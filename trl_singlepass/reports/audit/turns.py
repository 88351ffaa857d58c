"""What one conversation's turns hold, and what its chat template makes of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ...rendering.checks import contains, lost_calls, stray_reasoning, without
from ...rendering.conversation import Conversation, Message, RenderingError
from ...rendering.message_format import parse
from ...rendering.prefixes import Prefixes
from ...rendering.reasoning import ParsedMessage
from ...rendering.template import ChatTemplate
from ...rendering.tokenization import HardBorders, common_length, hard_borders, tokenize
from ...rendering.turn import RenderedTurn, render_turn
from ...trees.sample import CompletionKind


# What happens to a turn's reasoning.
NONE, RENDERED, RESTORED, OTHER_KEY, LOST = "none", "rendered", "restored", "other key", "lost"
# Why the next turn's prompt does not begin with this turn.
REASONING_REMOVED, EMPTY_BLOCK, OTHER_STOP = "reasoning removed", "empty reasoning block", "other stop token"
EARLIER_HISTORY, OTHERWISE = "earlier history rewritten", "otherwise rewritten"
# How a prompt is continued by the rendering with its answer.
AS_TOKENS, AS_TEXT, NOT_AT_ALL = "tokens", "text", "not at all"

_TAG_ROOM = 256  # characters at the end of a prompt in which tags of reasoning are looked for
_TAIL = 4096  # characters of a prompt in which its last added token is looked for first


@dataclass(frozen=True, slots=True)
class TurnFacts:
    """
    What one turn holds and what the template makes of it.

    Args:
        message_index (`int`):
            Position of its assistant message.
        kind (`CompletionKind`, *optional*):
            How its completion came about; `None` if the turn is refused.
        reasoning (`str`):
            `"none"` if it says none; `"rendered"` by the template; `"restored"`: left out by the template and put
            back by us; `"other key"`: under a key that the template ignores; `"lost"`.
        calls (`int`):
            Tool calls that it makes.
        calls_lost (`bool`):
            Whether one of them, or a part of one, is not in its rendering.
        stop_added (`bool`):
            Whether the template writes no stop token after it.
        prompt_continues (`str`):
            Whether the rendering with its answer continues its prompt: as `"tokens"`, as `"text"` only, or
            `"not at all"`.
        followed (`bool`):
            Whether another turn follows.
        hidden (`bool`):
            Whether it has reasoning that the next turn's prompt does not show.
        branches (`str`, *optional*):
            Why the next turn's prompt does not begin with this turn; `None` if it does, or none follows.
    """

    message_index: int
    kind: CompletionKind | None
    reasoning: str
    calls: int
    calls_lost: bool
    stop_added: bool
    prompt_continues: str
    followed: bool
    hidden: bool
    branches: str | None


@dataclass(frozen=True, slots=True)
class _Text:
    """Renderings of one turn: its prompt, the template's own with the answer, and as it is trained, if it can be."""

    message: Message
    parsed: ParsedMessage
    prompt: str
    own: str
    turn: RenderedTurn | None

    @property
    def own_completion(self) -> str:
        return self.own[common_length(self.prompt, self.own) :]

    @property
    def completion(self) -> str:
        return self.own_completion if self.turn is None else self.turn.completion

    @property
    def complete(self) -> str:
        return self.own if self.turn is None else self.prompt + self.turn.completion


def turn_facts(conversation: Conversation, prefixes: Prefixes) -> list[TurnFacts]:
    """
    Look at each turn of a conversation, whether it can be trained or not.

    Args:
        conversation ([`Conversation`]):
            The conversation.
        prefixes ([`Prefixes`]):
            Its beginnings under a chat template.

    Returns:
        `list[TurnFacts]`: One entry per assistant message that the template renders at all.
    """
    template = prefixes.template
    texts = list(_texts(conversation, prefixes))
    continuations = _continuations(texts, hard_borders(template.tokenizer, template.source))
    following = [text for _, text in texts[1:]]
    return [
        _facts(k, text, then, continues, template)
        for (k, text), then, continues in zip(texts, [*following, None][: len(texts)], continuations, strict=True)
    ]


def _texts(conversation: Conversation, prefixes: Prefixes) -> Iterator[tuple[int, _Text]]:
    for k in conversation.turns:
        try:
            prompt, own = prefixes.prompt(k), prefixes.through(k)
        except Exception:  # what the template refuses, the report tells by row
            continue
        parsed = parse(prefixes.trained.get(k, prefixes.messages[k]), prefixes.template)
        yield k, _Text(conversation.messages[k], parsed, prompt, own, _turn(prefixes, k))


def _turn(prefixes: Prefixes, k: int) -> RenderedTurn | None:
    try:
        return render_turn(prefixes, k)
    except RenderingError:  # the report names it by row
        return None


def _facts(k: int, text: _Text, then: _Text | None, continues: str, template: ChatTemplate) -> TurnFacts:
    parsed = text.parsed
    calls = len(parsed.calls) or int("function_call" in text.message)
    lost = calls > 0 and (
        not parsed.calls or lost_calls(parsed, without(text.completion, parsed.reasoning)) is not None
    )
    return TurnFacts(
        message_index=k,
        kind=None if text.turn is None else text.turn.kind,
        reasoning=_reasoning(text),
        calls=calls,
        calls_lost=lost,
        stop_added=text.turn is not None and text.turn.stop_added,
        prompt_continues=continues,
        followed=then is not None,
        hidden=bool(parsed.reasoning) and then is not None and not contains(then.prompt, parsed.reasoning),
        branches=None if then is None else _branches(template, text, then.prompt),
    )


def _reasoning(text: _Text) -> str:
    if any(not contains(text.completion, text.message[key]) for key in stray_reasoning(text.message)):
        return OTHER_KEY
    if not text.parsed.reasoning:
        return NONE
    if text.turn is not None:
        return RESTORED if text.turn.kind == CompletionKind.REASONING_RESTORED else RENDERED
    return RENDERED if contains(text.own_completion, text.parsed.reasoning) else LOST


def _branches(template: ChatTemplate, text: _Text, next_prompt: str) -> str | None:
    shared = common_length(text.complete, next_prompt)
    if shared == len(text.complete):
        return None
    head = len(text.prompt)
    if template.tags:
        opening, closing = re.escape(template.tags.opening), re.escape(template.tags.closing)
        # Some prompts end with the opening tag, or with a closed block: those belong to the answer.
        end = text.prompt[-_TAG_ROOM:]
        head -= len(end) - len(re.sub(rf"(?:{opening}\s*)?(?:{closing}\s*)?\Z", "", end))
        block = rf"(?:{opening}\s*)?{closing}\s*"
        without_block = text.complete[:head] + re.sub(block, "", text.complete[head:], count=1)
        if not text.parsed.reasoning and common_length(without_block, next_prompt) > max(shared, head):
            return EMPTY_BLOCK
    if shared < head:
        return EARLIER_HISTORY
    if text.parsed.reasoning and not contains(next_prompt[head:], text.parsed.reasoning):
        return REASONING_REMOVED
    rest = text.complete[shared:].strip()
    ends_in_other_token = any(token.endswith(rest) for token in template.tokenizer.get_added_vocab())
    return OTHER_STOP if ends_in_other_token else OTHERWISE


def _continuations(texts: list[tuple[int, _Text]], borders: HardBorders) -> list[str]:
    """Whether each rendering continues its prompt, as tokens or as text; tokens are compared at the border only."""
    pieces = [_pieces_at_the_border(text, borders) for _, text in texts]
    ids = iter(tokenize(borders, [piece for pair in pieces for piece in pair or ()]))
    found = []
    for pair in pieces:
        if pair is None:
            found.append(NOT_AT_ALL)
            continue
        prompt, rendering = next(ids), next(ids)
        found.append(AS_TOKENS if common_length(prompt, rendering) == len(prompt) else AS_TEXT)
    return found


def _pieces_at_the_border(text: _Text, borders: HardBorders) -> tuple[str, str] | None:
    """The stretches between two added tokens in which prompt and rendering meet; `None` if they do not."""
    if not text.own.startswith(text.prompt):
        return None
    tail = borders.split(text.prompt[-_TAIL:])
    pieces = tail if len(tail) > 1 else borders.split(text.prompt)
    start = len(text.prompt) - len(pieces[-1])
    continued = borders.split(text.complete[start:])
    return pieces[-1], continued[0] if len(continued[0]) >= len(pieces[-1]) else text.complete[start:]
