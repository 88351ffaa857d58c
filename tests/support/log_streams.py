"""Servers that stream their replies, and log the stream: as the text that went over the wire, or as its events."""

import json

from support.log_servers import AnthropicServer, OpenAIServer, ResponsesServer


def in_pieces(text, size=3):
    return [text[start : start + size] for start in range(0, len(text), size)]


class Streaming:
    """A server of `log_servers` whose reply is the text of a stream."""

    source = None
    server = None

    @classmethod
    def request(cls, messages):
        return {**cls.server.request(messages), "stream": True}

    @classmethod
    def reply(cls, body, message):
        events = cls.events(cls.server.reply(body, message))
        return (
            "".join(f"{cls.name(event)}data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
            + cls.end
        )

    @staticmethod
    def name(event):
        return f"event: {event['type']}\r\n"

    end = ""


class StreamingOpenAIServer(Streaming):
    source, server, end = "openai-chat", OpenAIServer, "data: [DONE]\n\n"

    @staticmethod
    def name(event):
        return ": keep-alive\n\n"

    @staticmethod
    def events(response):
        (choice,) = response["choices"]
        message = choice["message"]
        deltas = [{"role": "assistant", "content": ""}]
        for key in ("reasoning_content", "content"):
            deltas += [{key: piece} for piece in in_pieces(message.get(key) or "")]
        for index, call in enumerate(message["tool_calls"]):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            first = {"id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
            deltas.append({"tool_calls": [{"index": index, **first}]})
            deltas += [
                {"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in in_pieces(arguments)
            ]
        ends = [None] * len(deltas) + [choice["finish_reason"]]
        return [
            *(
                {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
                for delta, end in zip([*deltas, {}], ends, strict=True)
            ),
            {"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 9}},
        ]


class StreamingAnthropicServer(Streaming):
    source, server = "anthropic", AnthropicServer

    @staticmethod
    def events(response):
        yield {"type": "message_start", "message": {**response, "content": [], "stop_reason": None}}
        yield {"type": "ping"}
        for index, block in enumerate(response["content"]):
            empty = {"thinking": {"thinking": ""}, "text": {"text": ""}, "tool_use": {"input": {}}}[block["type"]]
            yield {"type": "content_block_start", "index": index, "content_block": {**block, **empty}}
            if block["type"] == "tool_use":
                deltas = [
                    {"type": "input_json_delta", "partial_json": p} for p in in_pieces(json.dumps(block["input"]))
                ]
            else:
                key = block["type"]
                deltas = [{"type": f"{key}_delta", key: piece} for piece in in_pieces(block[key])]
            yield from ({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas)
            yield {"type": "content_block_stop", "index": index}
        yield {"type": "message_delta", "delta": {"stop_reason": response["stop_reason"]}, "usage": {}}
        yield {"type": "message_stop"}


class StreamingResponsesServer(Streaming):
    source, server = "openai-responses", ResponsesServer

    @staticmethod
    def events(response):
        yield {"type": "response.created", "response": {**response, "status": "in_progress", "output": []}}
        yield {"type": "response.output_text.delta", "delta": "3"}
        yield {"type": "response.completed", "response": response}
