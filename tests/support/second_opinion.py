"""Conversations in which every part holds words of its own, and the chat templates that must render them."""

import copy
import json
import random
from itertools import count

import pytest

from support.chat_templates import HARD_TEMPLATES
from support.chat_tokenizers import make_tokenizer, template_names
from support.conversations import tool


TOOLS = [tool("lookup", "key")]
# Tokens at which the models of TRL's templates stop, where they are not the tokenizer's EOS token.
STOPS = {
    "gptoss": ("<|return|>", "<|call|>"),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "muse_glimmer": ("<|eot|>",),
    "idefics3": ("<end_of_utterance>",),
    "smolvlm": ("<end_of_utterance>",),
}
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")


class Author:
    """Writes conversations in which every part holds words of its own."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.words = count(seed * 1000)
        self.calls = count(seed * 100 % 9000)

    def words_for(self, kind: str) -> str:
        return " ".join(f"{kind}{next(self.words)}x" for _ in range(self.random.randint(1, 3)))

    def assistant(self, thinks: bool, calls: bool, empty: bool) -> dict:
        message = {"role": "assistant", "content": "" if empty or calls else self.words_for("answer")}
        if thinks:
            message["reasoning_content"] = self.words_for("reason")
        if calls:
            function = {"name": "lookup", "arguments": {"key": self.words_for("argument")}}
            message["tool_calls"] = [{"id": f"call{next(self.calls):05}", "type": "function", "function": function}]
        return message

    def tool(self, message: dict) -> dict:
        id_ = message["tool_calls"][0]["id"]
        return {"role": "tool", "name": "lookup", "tool_call_id": id_, "content": self.words_for("result")}

    def conversation(self, tools: bool) -> list[dict]:
        chance = self.random.random
        messages = [{"role": "system", "content": self.words_for("system")}] if chance() < 0.3 else []
        thinks = self.random.choice((0.0, 0.5, 1.0))
        for _ in range(self.random.randint(1, 4)):
            messages.append({"role": "user", "content": self.words_for("question")})
            while tools and chance() < 0.5:
                call = self.assistant(chance() < thinks, calls=True, empty=False)
                messages += [call, self.tool(call)]
            messages.append(self.assistant(chance() < thinks, calls=False, empty=chance() < 0.05))
            if chance() < 0.08:
                messages.append(self.assistant(chance() < thinks, calls=False, empty=False))
        return messages


def said(message: dict) -> list[str]:
    """The texts of a message, in the order in which a model writes them."""
    calls = [call["function"]["arguments"]["key"] for call in message.get("tool_calls") or []]
    return [text for text in (message.get("reasoning_content"), message["content"], *calls) if text]


def _templates():
    for name in template_names():
        stops = next((stops for prefix, stops in STOPS.items() if name.startswith(prefix)), None)
        yield pytest.param(name, None, stops, name.startswith(PARTS_ONLY), (), id=name)
    for name, hard in HARD_TEMPLATES.items():
        yield pytest.param(None, hard.source, hard.stops, hard.parts, hard.tokens, id=name)


TEMPLATES = list(_templates())


def tokenizer_for(name, source, stops, tokens=()):
    """Return a tokenizer with a template of TRL, or with another that has these stop tokens and special tokens."""
    tokenizer = make_tokenizer(name, source)
    if source:
        tokenizer.eos_token = stops[0]
        tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


# One message in other spellings. None of them changes what it says.


def _inline(message):
    reasoning = message.pop("reasoning_content", None)
    if reasoning:
        message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"


def _in_parts(message):
    reasoning = message.pop("reasoning_content", None)
    if reasoning:
        answer = [{"type": "text", "text": message["content"]}] if message["content"] else []
        message["content"] = [{"type": "thinking", "thinking": reasoning}, *answer]


def _under(key):
    def rename(message):
        if "reasoning_content" in message:
            message[key] = message.pop("reasoning_content")

    return rename


def _null(message):
    message["content"] = message["content"] or None


def _missing(message):
    if not message["content"] and len(message) > 2:
        del message["content"]


def _json(message):
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        function["arguments"] = json.dumps(function["arguments"])


def _flat(message):
    calls = message.get("tool_calls", ())
    if calls:
        message["tool_calls"] = [{"id": call["id"], **call["function"]} for call in calls]


SPELLINGS = {
    "thinking": _under("thinking"),
    "reasoning": _under("reasoning"),
    "inline": _inline,
    "parts": _in_parts,
    "null": _null,
    "missing": _missing,
    "json": _json,
    "flat": _flat,
}


def spelt(messages, *names):
    """Return a conversation whose assistant messages are spelt in other ways."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for name, spell in SPELLINGS.items():
            if name in names and message["role"] == "assistant":
                spell(message)
    return messages
