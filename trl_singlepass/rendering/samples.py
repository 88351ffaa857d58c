"""Turns of a conversation as samples: the prompt as served, the completion as generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..images.conversation_images import ConversationImages
from ..trees.sample import Sample
from ..trees.shared_array import SharedArray
from .checks import contains, is_object, prints
from .conversation import Conversation, Message, Tools, get_text
from .conversation import RenderingError as RenderingError
from .prefixes import Prefixes
from .shown_images import find_shown_images, without_image_parts
from .template import ChatTemplate
from .tokenization import Ids, common_length, tokenize, tokenize_after
from .turn import RenderedTurn, render_turn, rendering_error


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_COMMON_ROLES = ("system", "user", "assistant", "tool")
# Roles of messages that may stand before a conversation begins.
_SETUP_ROLES = ("system", "developer", "assistant")


def render_samples(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Tools | None = None,
    chat_template: str | None = None,
    **chat_template_kwargs: Any,
) -> list[Sample]:
    """
    Render every assistant message of a conversation as one sample.

    For the message at position `k`, the prompt is what the chat template renders from `messages[:k]` with its
    generation prompt, which is what the model sees at inference; the completion is what the model generates after it:
    the message's own part of the rendering of `messages[: k + 1]`, and nothing of any other message. Reasoning may
    stand under `reasoning_content`, `thinking` or `reasoning`, in a content part of type `"thinking"`, or between
    `<think>` tags in `content`; tool-call arguments may be dicts or JSON strings.

    Args:
        messages (`list[dict]`):
            The conversation, as for `apply_chat_template`.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        tools (`list`, *optional*):
            Tools that the model may call: JSON schemas or Python functions.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's own.
        chat_template_kwargs (`Any`):
            Further arguments of the template, such as `enable_thinking`.

    Returns:
        `list[Sample]`: One sample per assistant message, in the order of the conversation.

    Raises:
        `RenderingError`: If there is no assistant message, if the template refuses a message, or if reasoning, answer
            or tool calls of a message are not in its rendering.
    """
    return render_conversation(Conversation(list(messages), tools, chat_template_kwargs), tokenizer, chat_template)


def render_example(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    example_index: int | None = None,
) -> list[Sample]:
    """
    Render the trained assistant messages of a dataset example, as [`Conversation.from_example`] reads it.

    Errors are those of [`render_samples`], with the example's position in its dataset.
    """
    try:
        return render_conversation(Conversation.from_example(example), tokenizer, chat_template)
    except RenderingError as error:
        if example_index is None:
            raise
        raise RenderingError(f"Row {example_index}: {error}") from error


def render_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    *,
    prefixes: Prefixes | None = None,
) -> list[Sample]:
    """
    Render the turns of a conversation that has been read from a dataset example, given its prefixes if they are at
    hand.

    An assistant message that begins the conversation is context only where the template renders no prompt for it.
    """
    _check_has_turns(conversation)
    given, prefixes = prefixes, prefixes or Prefixes.from_conversation(conversation, tokenizer, chat_template)
    turns = _render_turns(conversation, prefixes, keep=given is not None or conversation.images is not None)
    if conversation.images is None:
        return _tokenize(turns, prefixes.template)
    return _tokenize_with_images(list(turns), prefixes, conversation.images)


def render_requests(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[list[Sample]]:
    """
    Render the turns of all requests of an example, each request as [`render_conversation`] does, with one clock.

    What requests begin alike with is prepared, and tokenized, once. A `RenderingError` names the request.
    """
    lengths: list[int] = []

    def turns() -> Iterator[RenderedTurn]:
        for conversation, of_request in zip(conversations, prefixes, strict=True):
            _check_has_turns(conversation)
            rendered = list(_render_turns(conversation, of_request, keep=False))
            lengths.append(len(rendered))
            yield from rendered

    try:
        prefixes = Prefixes.from_requests(conversations, tokenizer, chat_template)
        samples = iter(_tokenize(turns(), prefixes[0].template))
    except RenderingError as error:
        raise RenderingError(f"Request {len(lengths)}: {error}") from error
    return [list(islice(samples, length)) for length in lengths]


def _check_has_turns(conversation: Conversation) -> None:
    if not conversation.turns:
        roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in conversation.messages)) or "none"
        raise RenderingError(
            f"Expected at least one assistant message to train, got messages with the roles: {roles}. Name the role "
            "of the model's messages 'assistant', or leave the row out."
        )


def _render_turns(conversation: Conversation, prefixes: Prefixes, *, keep: bool) -> Iterator[RenderedTurn]:
    """Render one turn after another; without `keep`, the texts of a turn are forgotten when the next one is there."""
    last: int | None = None
    for k in conversation.turns:
        if not has_prompt(prefixes, k):
            continue
        turn = render_turn(prefixes, k)
        _check_context(prefixes, range(last or 0, k), turn)
        last = k
        yield turn
        if not keep:
            prefixes.forget(k)
    if last is None:
        raise _no_prompt(prefixes, conversation.turns[-1])


def has_prompt(prefixes: Prefixes, k: int) -> bool:
    """Return whether there is anything that a model could be served before message `k`."""
    if any(message.get("role") not in _SETUP_ROLES for message in prefixes.messages[:k]):
        return True
    try:
        return k > 0 and bool(prefixes.prompt(k))
    except RenderingError:  # some templates take no conversation in which no user has spoken yet
        return False


def _no_prompt(prefixes: Prefixes, k: int) -> RenderingError:
    reason = "it begins the conversation, so there is no prompt. Put a user message before it"
    try:
        if k:
            prefixes.prompt(k)
    except RenderingError as error:
        reason = str(error)
    return rendering_error(prefixes.template, k, reason)


def _check_context(prefixes: Prefixes, messages: Iterable[int], turn: RenderedTurn) -> None:
    """Refuse messages before a turn whose role, or whose object content, the template silently drops."""
    for k in messages:
        message = prefixes.messages[k]
        content = without_image_parts(message.get("content"))
        if is_object(content) and not prints(turn.prompt, content):
            reason = "the template drops its content, which is an object. Store it as text, with json.dumps"
            raise rendering_error(prefixes.template, k, reason)
        if message.get("role") in _COMMON_ROLES:
            continue
        if not contains(turn.prompt, get_text(content)):
            reason = f"the template drops messages of the role '{message.get('role')}'. Give it a role that it knows"
            raise rendering_error(prefixes.template, k, reason)


def _tokenize_with_images(turns: list[RenderedTurn], prefixes: Prefixes, images: ConversationImages) -> list[Sample]:
    """Tokenize turns as their processor does: with what it writes for each image in the place of its placeholder."""
    shown = [find_shown_images(prefixes, turn, images) for turn in turns]
    expanded = [replace(turn, prompt=images.write(turn.prompt, of)) for turn, of in zip(turns, shown, strict=True)]
    samples = _tokenize(expanded, prefixes.template)
    return [
        replace(
            sample,
            image_features=images.features_in(sample.token_ids, of),
            images=images.references,
            text=(turn.prompt, turn.completion),
        )
        for sample, turn, of in zip(samples, turns, shown, strict=True)
    ]


def _tokenize(turns: Iterable[RenderedTurn], template: ChatTemplate) -> list[Sample]:
    facts: list[RenderedTurn] = []  # without their prompts, whose texts are long

    def texts() -> Iterator[str]:
        for turn in turns:
            facts.append(replace(turn, prompt=""))
            yield turn.prompt
            yield turn.prompt + turn.completion[: turn.reasoning_end]
            yield turn.prompt + turn.completion

    ids = iter(tokenize(template.borders, texts()))
    return [_sample(turn, prompt, next(ids), next(ids), template) for turn, prompt in zip(facts, ids, strict=False)]


def _sample(
    turn: RenderedTurn, prompt: SharedArray, reasoning: SharedArray, whole: SharedArray, template: ChatTemplate
) -> Sample:
    start = len(prompt)
    if prompt.common_length(whole) < start:
        # A token of the whole text reaches over the border. The model sees the prompt's own tokens.
        parts = (turn.completion[: turn.reasoning_end], turn.completion)
        reasoning, whole = (prompt.followed_by(tokenize_after(template.tokenizer, text)) for text in parts)
    length = 0
    if turn.reasoning_end:
        text = turn.completion[: turn.reasoning_end]
        length = _count_tokens_of(text, reasoning.tail(start), whole.tail(start), template.tokenizer)
    facts = turn.message_index, length, turn.kind, turn.has_empty_block
    return Sample.from_prompt_and_completion(prompt, whole.tail(start), *facts)


def _count_tokens_of(text: str, alone: Ids, whole: Ids, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Return how many tokens of a completion begin within the text that it begins with.

    `alone` are the tokens of that text, `whole` those of the completion, which may be cut in other places around the
    end of the text: "so $." is "so", " $.", and "so $.\\nYes" is "so", " $", ".\\n", "Yes".
    """
    shared = common_length(alone, whole)
    if shared < len(alone):
        covered = "".join(text.split())
        for count in range(shared + 1, len(whole) + 1):
            if "".join(tokenizer.decode(whole[:count]).split()).startswith(covered):
                return count
            if count > shared + len(text):
                break  # the tokenizer does not give back what it read
    return min(len(alone), len(whole))
