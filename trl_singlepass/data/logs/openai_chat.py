"""
Logs of OpenAI's Chat Completions API, as proxies and OpenAI-compatible servers write them.

Source: https://platform.openai.com/docs/api-reference/chat and `…/chat-streaming`; for `chat_template_kwargs`,
`reasoning_effort`, `reasoning` and `stop_reason`, vLLM's and SGLang's OpenAI-compatible servers. Tokens come from
`return_token_ids` of vLLM's, and from `input_ids`, `output_ids` and `meta_info` of SGLang's `/generate`.
"""

from __future__ import annotations

from ...rendering.conversation import Message
from ...rendering.validation import REASONING_KEYS
from .lines import (
    Json,
    LogError,
    LoggedRequest,
    LoggedTokens,
    LogLine,
    append_delta,
    assistant_message,
    get,
    get_index,
    get_objects,
    given,
    join_text,
    need,
    require,
    tool_call,
    unknown_stream,
)


_ENDED = ("stop", "tool_calls")
# What would change the prompt in a way that a dataset cannot say.
_UNTRAINABLE = ("functions", "documents", "chat_template", "continue_final_message")


def read_line(line: LogLine) -> list[LoggedRequest]:
    """Return each choice of a response with the messages that were sent."""
    return read_exchange(line, *line.get_exchange(join_chunks))


def read_exchange(line: LogLine, request: Json, response: Json) -> list[LoggedRequest]:
    """Return each choice of a response with the messages that were sent."""
    untrainable = [key for key in _UNTRAINABLE if request.get(key)]
    if untrainable:
        raise LogError(f"The request has '{untrainable[0]}', which changes the prompt in a way that no dataset holds.")
    require(request.get("messages"), "messages")
    context = [read_message(message) for message in get_objects(request, "messages")]
    tools = get_objects(request, "tools") or None
    kwargs = dict(get(request, "chat_template_kwargs", dict) or {})
    if request.get("reasoning_effort") is not None:  # servers hand it to the template
        kwargs.setdefault("reasoning_effort", request["reasoning_effort"])
    requests, conversation = [], line.get_conversation(request)
    for choice in _get_choices(response):
        _check_ended(choice)
        message = need(choice, "message", dict)
        reply = read_message({**message, "role": "assistant"})
        details = get_objects(message, "reasoning_details")
        hidden = "reasoning_content" not in reply and any(one.get("type") == "reasoning.encrypted" for one in details)
        requests.append(LoggedRequest(line.place, context, reply, tools, kwargs, hidden, conversation))
    return requests


def _get_choices(response: Json) -> list[Json]:
    """Return the choices of a response, at least one."""
    choices = get_objects(response, "choices")
    if not choices:
        raise LogError("The response has no choices.")
    return choices


def _check_ended(choice: Json) -> None:
    """Refuse a reply that did not end by itself: it would be trained as if the model had meant to stop there."""
    reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
    if reason not in _ENDED:
        raise LogError(f"The reply did not end: its finish_reason is '{reason}', expected 'stop' or 'tool_calls'.")
    if isinstance(stop, str):
        raise LogError(f"The reply was cut at the stop string '{stop}'.")


def read_message(message: Json) -> Message:
    """Return a message, without the keys that chat templates do not read (`annotations`, `provider`, …)."""
    role = need(message, "role", str)
    if role == "assistant":
        return _read_assistant(message)
    content = join_text(message.get("content"), f"a '{role}' message")
    if role == "function":
        raise LogError("A message has the role 'function', which has been replaced by 'tool'.")
    if role == "tool":
        ids = {"tool_call_id": message.get("tool_call_id"), "name": message.get("name")}
        return given(role=role, content=content or "", **ids)
    return {**given(role=role, name=message.get("name")), "content": content}


def _read_assistant(message: Json) -> Message:
    lost = [key for key in ("refusal", "audio", "function_call") if message.get(key)]
    if lost:
        raise LogError(f"An assistant message has '{lost[0]}', which no chat template renders.")
    content = join_text(message.get("content"), "an assistant message")
    texts = (get(message, key, str) for key in REASONING_KEYS)
    reasoning = next((text for text in texts if text is not None), None)
    calls = [_read_call(call) for call in get_objects(message, "tool_calls")]
    return assistant_message(content, reasoning, calls)


def _read_call(call: Json) -> Json:
    function = get(call, "function", dict)
    if function is None:
        raise LogError(f"A tool call has the type '{call.get('type')}', expected 'function'.")
    return tool_call(function.get("name"), function.get("arguments"), call.get("id"))


def join_chunks(chunks: list[Json]) -> Json:
    """Return the response that the chunks of a stream add up to."""
    if "choices" not in chunks[0]:
        raise unknown_stream(chunks)
    response: Json = {}
    choices: dict[int, Json] = {}
    for chunk in chunks:
        response.update({key: value for key, value in chunk.items() if key != "choices" and value is not None})
        for choice in get_objects(chunk, "choices"):
            index = get_index(choice, 0)
            whole = choices.setdefault(index, {"index": index, "message": {"tool_calls": []}})
            _add_delta(whole["message"], get(choice, "delta", dict) or {})
            rest = {key: value for key, value in choice.items() if key not in ("index", "delta", "logprobs")}
            append_delta(whole, rest)
    ended = [{**choice, "message": _without_empty_text(choice["message"])} for choice in choices.values()]
    return {**response, "object": "chat.completion", "choices": ended}


def _without_empty_text(message: Json) -> Json:
    """Drop text that only opens a stream: it is null in a whole response, unless the answer itself is empty."""
    answers = {"content"} if not message["tool_calls"] else set()
    return {key: value for key, value in message.items() if value != "" or key in answers}


def _add_delta(message: Json, delta: Json) -> None:
    for call in get_objects(delta, "tool_calls"):
        calls = message["tool_calls"]
        index = get_index(call, len(calls))  # servers that leave it out send whole calls
        if index > len(calls):
            raise LogError(f"The streamed response has a part of tool call {index}, and no call {len(calls)}.")
        if index == len(calls):
            calls.append({"type": "function", "function": {}})
        function, more = calls[index]["function"], get(call, "function", dict) or {}
        calls[index].setdefault("id", call.get("id"))
        function.setdefault("name", more.get("name"))
        append_delta(function, {"arguments": more.get("arguments")})
    append_delta(message, {key: value for key, value in delta.items() if key not in ("role", "tool_calls")})


# Tokens that vLLM and SGLang read and wrote, without a chat template in between --------------------------------------


_VLLM_WAY_OUT = "Send requests with 'return_token_ids': true"
_SGLANG_WAY_OUT = "Send requests with 'input_ids' and 'return_logprob': true"


def read_vllm_line(line: LogLine) -> list[LoggedTokens]:
    """Return the tokens of each choice of a response of vLLM."""
    request, response = line.get_exchange(join_chunks)
    turns = []
    for choice in _get_choices(response):
        _check_ended(choice)
        prompt = _get_token_ids(choice, "prompt_token_ids") or _get_token_ids(response, "prompt_token_ids")
        turns.append(_to_turn(line, request, prompt, _get_token_ids(choice, "token_ids"), _VLLM_WAY_OUT))
    return turns


def read_sglang_line(line: LogLine) -> list[LoggedTokens]:
    """Return the tokens of a response of SGLang."""
    request, response = line.get_exchange(join_chunks)
    info = need(response, "meta_info", dict)
    reason = get(info, "finish_reason", dict) or {}
    _check_ended({"finish_reason": reason.get("type"), "stop_reason": reason.get("matched")})
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
    return LoggedTokens(line.place, prompt, completion, line.get_conversation(request))
