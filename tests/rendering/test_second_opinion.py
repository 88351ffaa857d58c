"""
A second opinion on rendering that shares no code with it.

Conversations hold a different word in each place. A sample is right if its prompt is what `apply_chat_template` gives
for the messages before the turn, and if its completion holds the words of the turn, each once and in order, no word of
any other message, and a stop token at its end. Or the turn is refused.
"""

import json
import re
from collections import Counter

import pytest

from support.chat_templates import HARD_TEMPLATES
from support.chat_tokenizers import template_text
from support.conversations import as_blocks
from support.public_data import CONVERSATIONS, FOLDER, released_qwen3_tokenizer
from support.second_opinion import TEMPLATES, TOOLS, Author, said, tokenizer_for
from trl_singlepass.rendering.conversation import Conversation, RenderingError
from trl_singlepass.rendering.samples import render_conversation, render_example


# Answers that begin like markup, reasoning that is found within markup, and both in one another.
TRICKY = ("end", "think", "assistant", "H", "<b>", "final")


def without_time(text: str) -> str:
    return re.sub(r"\d\d:\d\d:\d\d", "", text)


def with_json_arguments(messages: list[dict]) -> list[dict]:
    copies = json.loads(json.dumps(messages))
    for call in (call for message in copies for call in message.get("tool_calls") or []):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return copies


def faults(messages, tokenizer, stops, tools, parts) -> list[str]:
    """What is wrong with the samples of a conversation; nothing if it is refused."""
    samples = render_conversation(Conversation(messages, tools), tokenizer)
    served = as_blocks(messages) if parts else messages
    if "+ tool['function']['arguments'] +" in tokenizer.chat_template:  # DeepSeek's
        served = with_json_arguments(served)
    found = []
    for sample in samples:
        k = sample.message_index
        prompt = tokenizer.apply_chat_template(served[:k], tools=tools, add_generation_prompt=True, tokenize=False)
        ids = [int(i) for i in sample.token_ids]
        text = tokenizer.decode(ids[sample.prompt_length :])
        served_prompt = tokenizer.decode(ids[: sample.prompt_length])
        if without_time(served_prompt) != without_time(prompt):
            found.append(f"message {k}: the prompt {served_prompt[-90:]!r} is served as {prompt[-90:]!r}")
        position = 0
        for part in said(messages[k]):
            at = text.find(part, position)
            if at < 0 or text.count(part) != 1:
                found.append(f"message {k}: {part!r} stands {text.count(part)} times in {text!r}")
            position = at + len(part)
        others = [
            word
            for i, other in enumerate(messages)
            if i != k
            for part in said_or_content(other)
            for word in part.split()
        ]
        found += [f"message {k}: {word!r} of another message in {text!r}" for word in others if word in text]
        if not text.rstrip().endswith(stops):
            found.append(f"message {k}: no stop token at the end of {text!r}")
    return found


def said_or_content(message: dict) -> list[str]:
    return said(message) if message["role"] == "assistant" else [message["content"]]


def check_template(name, source, stops, parts, tokens, seeds) -> Counter:
    tokenizer = tokenizer_for(name, source, stops, tokens)
    stops = stops or (tokenizer.eos_token,)
    outcomes = Counter()
    for seed in seeds:
        tools = TOOLS if seed % 2 else None
        messages = Author(seed).conversation(tools is not None)
        try:
            found = faults(messages, tokenizer, stops, tools, parts)
        except RenderingError:
            outcomes["refused"] += 1
            continue
        outcomes["rendered"] += 1
        assert not found, "\n".join([*found[:3], json.dumps(messages)])
    return outcomes


@pytest.mark.parametrize(("name", "source", "stops", "parts", "tokens"), TEMPLATES)
def test_prompts_are_served_and_completions_hold_the_turn_alone(name, source, stops, parts, tokens):
    outcomes = check_template(name, source, stops, parts, tokens, range(4))
    assert outcomes["rendered"], "refusing everything is no way to be right"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source", "stops", "parts", "tokens"), TEMPLATES)
def test_prompts_are_served_and_completions_hold_the_turn_alone_over_many(name, source, stops, parts, tokens):
    check_template(name, source, stops, parts, tokens, range(10, 170))


@pytest.mark.parametrize(("name", "source", "stops", "parts", "tokens"), TEMPLATES)
@pytest.mark.parametrize("key", ["reasoning_content", "content"])
def test_words_that_stand_in_markup_are_neither_found_nor_lost_there(name, source, stops, parts, tokens, key):
    tokenizer = tokenizer_for(name, source, stops, tokens)
    for word in TRICKY:
        message = {"role": "assistant", "reasoning_content": "Rowan", "content": "Aspen"} | {key: word}
        if key == "content":
            del message["reasoning_content"]
        conversation = Conversation([{"role": "user", "content": "Juniper"}, message])
        try:
            (sample,) = render_conversation(conversation, tokenizer)
        except RenderingError as error:
            # For no other reason than that of a word which stands nowhere else.
            plain = {**message, key: "Hazel"}
            with pytest.raises(RenderingError, match=re.escape(str(error).split(": ", 1)[1].split("'")[0][:40])):
                render_conversation(Conversation([conversation.messages[0], plain]), tokenizer)
            continue
        plain = {**message, key: "Hazel"}
        (expected,) = render_conversation(Conversation([conversation.messages[0], plain]), tokenizer)
        texts = [tokenizer.decode(s.token_ids[s.prompt_length :]) for s in (sample, expected)]
        assert texts[0] == texts[1].replace("Hazel", word)


@pytest.fixture(scope="module")
def real_tokenizer():
    return released_qwen3_tokenizer()


@pytest.mark.parametrize("file", CONVERSATIONS)
@pytest.mark.parametrize(
    "name", ["gptoss", "round dropped", "final without stop", "qwen3", "glm4moe", "nemotron_3_nano"]
)
def test_no_tool_result_of_a_real_conversation_is_trained(name, file, real_tokenizer):
    path = FOLDER / "data" / f"{file}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    real_tokenizer.chat_template = HARD_TEMPLATES[name].source if name in HARD_TEMPLATES else template_text(name)
    trained = 0
    for line in path.read_text().splitlines()[:10]:
        row = json.loads(line)
        try:
            samples = render_example(row, real_tokenizer)
        except RenderingError:
            continue
        results = [
            m["content"] for m in row["messages"] if m["role"] in ("tool", "user") and len(m["content"] or "") > 40
        ]
        for sample in samples[-6:]:
            completion = real_tokenizer.decode(sample.token_ids[sample.prompt_length :])
            own = json.dumps(row["messages"][sample.message_index], ensure_ascii=False)
            assert not [text for text in results if text in completion and text not in own]
            trained += 1
    assert trained or name == "gptoss"
