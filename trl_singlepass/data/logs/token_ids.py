"""
Token logs of inference servers: what the server read and wrote, without a chat template in between.

Sources: `return_token_ids` of vLLM's OpenAI-compatible server; `input_ids`, `output_ids` and `meta_info` of SGLang's
`/generate`.
"""

from __future__ import annotations

from .lines import Json, LogError, LogLine, get, get_conversation, get_exchange, need
from .openai_chat import check_ended, get_choices, join_chunks
from .requests import LoggedTokens


_VLLM_WAY_OUT = "Send requests with 'return_token_ids': true"
_SGLANG_WAY_OUT = "Send requests with 'input_ids' and 'return_logprob': true"


def read_vllm_line(line: LogLine) -> list[LoggedTokens]:
    """Return the tokens of each choice of a response of vLLM."""
    request, response = get_exchange(line, join_chunks)
    turns = []
    for choice in get_choices(response):
        check_ended(choice)
        prompt = _get_token_ids(choice, "prompt_token_ids") or _get_token_ids(response, "prompt_token_ids")
        turns.append(_to_turn(line, request, prompt, _get_token_ids(choice, "token_ids"), _VLLM_WAY_OUT))
    return turns


def read_sglang_line(line: LogLine) -> list[LoggedTokens]:
    """Return the tokens of a response of SGLang."""
    request, response = get_exchange(line, join_chunks)
    info = need(response, "meta_info", dict)
    reason = get(info, "finish_reason", dict) or {}
    check_ended({"finish_reason": reason.get("type"), "stop_reason": reason.get("matched")})
    prompt, completion = _get_token_ids(request, "input_ids"), _get_token_ids(response, "output_ids")
    if completion is None and "output_token_logprobs" in info:
        # Each entry is a log probability, a token id, and the token's text.
        entries = get(info, "output_token_logprobs", list) or []
        completion = _get_token_ids(
            {"output_token_logprobs": [entry[1] for entry in entries]}, "output_token_logprobs"
        )
    for tokens, key in ((prompt, "prompt_tokens"), (completion, "completion_tokens")):
        if tokens is not None and info.get(key) not in (None, len(tokens)):
            raise LogError(f"The log has {len(tokens)} token ids, but '{key}' is {info[key]}.")
    return [_to_turn(line, request, prompt, completion, _SGLANG_WAY_OUT)]


def _get_token_ids(parent: Json, key: str) -> list[int] | None:
    ids = get(parent, key, list)
    if ids is not None and not all(type(token) is int for token in ids):
        raise LogError(f"'{key}' must hold whole numbers only.")
    return ids


def _to_turn(
    line: LogLine, request: Json, prompt: list[int] | None, completion: list[int] | None, way_out: str
) -> LoggedTokens:
    """Return a prompt and its completion; the line or the request may name their conversation."""
    if not prompt or not completion:
        raise LogError(f"The log has no tokens of the {'reply' if prompt else 'prompt'}. {way_out}.")
    return LoggedTokens(line.place, prompt, completion, get_conversation(line, request))
