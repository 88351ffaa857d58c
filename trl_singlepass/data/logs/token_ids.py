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

    `line` or `request` may name the conversation, as `conversation_id` or `session_id`. `way_out` says how to log
    tokens, for the [`LogError`] if there are none.
    """
    if not prompt or not completion:
        raise LogError(f"The log has no tokens of the {'reply' if prompt else 'prompt'}. {way_out}.")
    names = [parent[key] for parent in (line.entry, request) for key in _CONVERSATION_KEYS if parent.get(key)]
    return LoggedTokens(line.place, prompt, completion, str(names[0]) if names else None)
