"""
Token logs of vLLM: what the server read and wrote, without a chat template in between.

Source: `return_token_ids` of its OpenAI-compatible server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .bad_lines import BadLines
from .exchange import get_exchange
from .openai_chat import check_ended, get_choices
from .requests import LoggedTokens, LogLine, parse_each_line
from .token_ids import get_token_ids, to_turn


_WAY_OUT = "Send requests with 'return_token_ids': true"


def parse(lines: Iterable[LogLine], bad_lines: BadLines) -> Iterator[LoggedTokens]:
    """Yield the tokens of each choice of each response."""
    return parse_each_line(lines, bad_lines, _parse_line)


def _parse_line(line: LogLine) -> list[LoggedTokens]:
    request, response = get_exchange(line)
    turns = []
    for choice in get_choices(response):
        check_ended(choice)
        prompt = get_token_ids(choice, "prompt_token_ids") or get_token_ids(response, "prompt_token_ids")
        turns.append(to_turn(line, request, prompt, get_token_ids(choice, "token_ids"), _WAY_OUT))
    return turns
