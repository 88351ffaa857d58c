"""
Token logs of SGLang: what the server read and wrote, without a chat template in between.

Source: `input_ids`, `output_ids` and `meta_info` of its `/generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .bad_lines import BadLines, LogError
from .exchange import get_exchange
from .fields import get_list, get_object, require
from .openai_chat import check_ended
from .requests import Json, LoggedTokens, LogLine, parse_each_line
from .token_ids import get_token_ids, to_turn


_WAY_OUT = "Send requests with 'input_ids' and 'return_logprob': true"


def parse(lines: Iterable[LogLine], bad_lines: BadLines) -> Iterator[LoggedTokens]:
    """Yield the tokens of each response."""
    return parse_each_line(lines, bad_lines, _parse_line)


def _parse_line(line: LogLine) -> list[LoggedTokens]:
    request, response = get_exchange(line)
    info = require(get_object(response, "meta_info"), "meta_info")
    reason = get_object(info, "finish_reason") or {}
    check_ended({"finish_reason": reason.get("type"), "stop_reason": reason.get("matched")})
    prompt, completion = get_token_ids(request, "input_ids"), _get_completion(response, info)
    for ids, key in ((prompt, "prompt_tokens"), (completion, "completion_tokens")):
        if ids is not None and info.get(key) not in (None, len(ids)):
            raise LogError(f"The log has {len(ids)} token ids, but '{key}' is {info[key]}.")
    return [to_turn(line, request, prompt, completion, _WAY_OUT)]


def _get_completion(response: Json, info: Json) -> list[int] | None:
    ids = get_token_ids(response, "output_ids")
    if ids is not None or "output_token_logprobs" not in info:
        return ids
    # Each entry is a log probability, a token id, and the token's text.
    entries = get_list(info, "output_token_logprobs") or []
    return get_token_ids({"output_token_logprobs": [entry[1] for entry in entries]}, "output_token_logprobs")
