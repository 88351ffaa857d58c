"""Turns of a conversation as samples: the prompt as served, the completion as generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from .rendering_checks import contains, is_object, losses, prints, template_name
from .rendering_messages import Conversation, Message, text_of
from .rendering_messages import RenderingError as RenderingError
from .rendering_prefixes import Prefixes
from .rendering_reasoning import Spoken
from .rendering_templates import ChatTemplate
from .rendering_tokens import Ids, common_length, hard_borders, tokenize, tokenize_after
from .rendering_validation import missing_parts
from .sample import Sample


logger = logging.get_logger(__name__)

_COMMON_ROLES = ("system", "user", "assistant", "tool")


def render_samples(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    tools: list[Any] | None = None,
    chat_template: str | None = None,
    **chat_template_kwargs: Any,
) -> list[Sample]:
    """
    Render every assistant message of a conversation as one sample.

    For the message at position `k`, the prompt is what the chat template renders from `messages[:k]` with its
    generation prompt, which is what the model sees at inference; the completion is what the rendering of
    `messages[: k + 1]` adds to it. Reasoning may stand under `reasoning_content`, `thinking` or `reasoning`, or
    between `<think>` tags in `content`; tool-call arguments may be dicts or JSON strings.

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


def render_row(
    row: dict[str, Any], tokenizer: Any, *, chat_template: str | None = None, row_index: int | None = None
) -> list[Sample]:
    """
    Render the turns of one dataset row.

    Args:
        row (`dict`):
            `messages`, or `prompt` and `completion` as lists of messages (only the completion is trained), or
            ShareGPT's `conversations`; optionally `tools` and `chat_template_kwargs`.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's own.
        row_index (`int`, *optional*):
            Position of the row, for error messages.

    Returns:
        `list[Sample]`: One sample per trained assistant message.

    Raises:
        `RenderingError`: As [`render_samples`], with the row's position.
    """
    try:
        return render_conversation(Conversation.from_row(row), tokenizer, chat_template)
    except RenderingError as error:
        if row_index is None:
            raise
        raise RenderingError(f"Row {row_index}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Turn:
    """Text of one turn: `rendering` is prompt and completion; up to `reasoning_end`, the completion is reasoning."""

    message_index: int
    prompt: str
    rendering: str
    reasoning_end: int


def render_conversation(
    conversation: Conversation, tokenizer: Any, chat_template: str | None = None, *, prefixes: Prefixes | None = None
) -> list[Sample]:
    """
    Render the turns of a conversation that has been read from a dataset row.

    Args:
        conversation (`Conversation`):
            The conversation.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with a chat template.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's own.
        prefixes ([`Prefixes`], *optional*):
            The beginnings of the conversation under that template, where they are at hand.

    Returns:
        `list[Sample]`: One sample per trained assistant message.

    Raises:
        `RenderingError`: As [`render_samples`].
    """
    messages = conversation.messages
    trained = [k for k in range(conversation.first_trained, len(messages)) if messages[k].get("role") == "assistant"]
    if not trained:
        roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages)) or "none"
        raise RenderingError(
            f"Expected at least one assistant message to train, got messages with the roles: {roles}. Name the role "
            "of the model's messages 'assistant', or leave the row out."
        )
    prefixes = prefixes or Prefixes.of_conversation(conversation, tokenizer, chat_template)
    turns = [_turn(prefixes, k) for k in trained]
    _check_context(prefixes, turns)
    return _samples(turns, prefixes.template)


def _turn(prefixes: Prefixes, k: int) -> _Turn:
    template, message = prefixes.template, prefixes.messages[k]
    said = template.spoken(message)
    if k == 0:
        raise _error(template, k, "it begins the conversation, so there is no prompt. Put a message before it")
    try:
        prompt = prefixes.render(k, add_generation_prompt=True)
        rendering = _complete(prefixes, k, prompt, said)
    except RenderingError as error:
        raise _error(template, k, str(error)) from error
    except Exception as error:  # a template raises what it likes
        missing = missing_parts(error, prefixes.messages[: k + 1], template.tools)
        raise _error(template, k, f"the template refuses the conversation up to it: {error!r}{missing}") from error
    completion = rendering[common_length(prompt, rendering) :]
    for loss in losses(message, said, completion, template.source):
        raise _error(template, k, loss)
    return _Turn(k, prompt, rendering, template.reasoning_end(prompt, rendering, said))


def _complete(prefixes: Prefixes, k: int, prompt: str, said: Spoken) -> str:
    """Return prompt and completion, with the reasoning and the stop token that the template left out."""
    rendering = prefixes.render(k + 1)
    if not contains(rendering[common_length(prompt, rendering) :], said.reasoning):
        rendering = prefixes.add_reasoning(k + 1, prompt) or rendering
    return rendering + prefixes.template.stop_after(said)


def _check_context(prefixes: Prefixes, turns: list[_Turn]) -> None:
    """Refuse messages of which the template drops the role, or content that is an object, without a word."""
    for k, message in enumerate(prefixes.messages):
        following = next((turn for turn in turns if turn.message_index > k), None)
        content = message.get("content")
        if following and is_object(content) and not prints(following.prompt, content):
            reason = "the template drops its content, which is an object. Store it as text, with json.dumps"
            raise _error(prefixes.template, k, reason)
        if message.get("role") in _COMMON_ROLES:
            continue
        if following and not contains(following.prompt, text_of(content)):
            reason = f"the template drops messages of the role '{message.get('role')}'. Give it a role that it knows"
            raise _error(prefixes.template, k, reason)


def _samples(turns: list[_Turn], template: ChatTemplate) -> list[Sample]:
    borders = hard_borders(template.tokenizer, template.source)
    texts = [(turn.prompt, turn.rendering[: turn.reasoning_end], turn.rendering) for turn in turns]
    ids = iter(tokenize(borders, [text for of_turn in texts for text in of_turn]))
    return [_sample(turn, prompt, next(ids), next(ids), template) for turn, prompt in zip(turns, ids, strict=False)]


def _sample(turn: _Turn, prompt: Ids, reasoning: Ids, rendering: Ids, template: ChatTemplate) -> Sample:
    start = common_length(prompt, rendering)
    if start < len(prompt) and turn.rendering.startswith(turn.prompt):
        # A token of the rendering reaches over the border. The model sees the prompt's own tokens.
        after = [turn.rendering[len(turn.prompt) : end] for end in (max(turn.reasoning_end, len(turn.prompt)), None)]
        reasoning, completion = (tokenize_after(template.tokenizer, text) for text in after)
        length = _length_within(reasoning, completion) if turn.reasoning_end else 0
        return Sample.from_prompt_and_completion(prompt, completion, turn.message_index, length)
    if start == 0:
        raise _error(template, turn.message_index, "its rendering has no token in common with its prompt")
    if start < len(prompt):
        _warn_of_other_prompt(template)
    length = _length_within(reasoning, rendering) - start if turn.reasoning_end else 0
    return Sample.from_prompt_and_completion(rendering[:start], rendering[start:], turn.message_index, length)


def _length_within(beginning: Ids, whole: Ids) -> int:
    """Number of tokens of a text that begin in a given beginning of it."""
    shared = common_length(beginning, whole)
    return shared if shared == len(beginning) else shared + 1  # one that reaches over its end counts


def _warn_of_other_prompt(template: ChatTemplate) -> None:
    logger.warning_once(
        f"The {template_name(template.tokenizer, template.source)} renders prompts differently from the same messages "
        "followed by their answer. Such a completion is all that follows their longest common prefix, with what "
        "messages of other roles say there, and its context differs from inference. Arguments in "
        "'chat_template_kwargs' (such as enable_thinking) may make them agree."
    )


def _error(template: ChatTemplate, k: int, reason: str) -> RenderingError:
    name = template_name(template.tokenizer, template.source)
    return RenderingError(f"Message {k} cannot be rendered with the {name}: {reason.removesuffix('.')}.")
