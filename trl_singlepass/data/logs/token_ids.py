"""Tokens in the log of an inference server."""

from __future__ import annotations

from .bad_lines import LogError
from .fields import get_list
from .requests import Json, LoggedTokens, LogLine


_CONVERSATION_KEYS = ("conversation_id", "session_id")


def get_token_ids(parent: Json, key: str) -> list[int] | None:
    """Return the token ids under a key; `None` if there are none."""
    ids = get_list(parent, key)
    if ids is not None and not all(type(token) is int for token in ids):
        raise LogError(f"'{key}' must hold whole numbers only.")
    return ids


def to_turn(
    line: LogLine, request: Json, prompt: list[int] | None, completion: list[int] | None, way_out: str
) -> LoggedTokens:
    """
    Return a prompt and its completion as a turn.

    Args:
        line ([`LogLine`]):
            Line that they are on. It names the conversation, if it is known, as `conversation_id` or `session_id`.
        request (`dict`):
            Request on it, which may name the conversation as well.
        prompt (`list[int]`, *optional*):
            Tokens of the prompt.
        completion (`list[int]`, *optional*):
            Tokens of the reply.
        way_out (`str`):
            How to log tokens, for the error.

    Returns:
        [`LoggedTokens`]: The turn.

    Raises:
        [`LogError`]: If there are no tokens.
    """
    if not prompt or not completion:
        raise LogError(f"The log has no tokens of the {'reply' if prompt else 'prompt'}. {way_out}.")
    names = [parent[key] for parent in (line.entry, request) for key in _CONVERSATION_KEYS if parent.get(key)]
    return LoggedTokens(line.place, prompt, completion, str(names[0]) if names else None)
