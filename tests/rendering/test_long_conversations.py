"""Conversations of many turns: memory, and tokens that are encoded, grow like the tree, not like the samples."""

import tracemalloc

import pytest
import transformers.tokenization_utils_base

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, tool_chat
from trl_singlepass import PrefixTree, render_samples
from trl_singlepass.rendering import prefixes as rendering_prefixes
from trl_singlepass.rendering.conversation import Conversation
from trl_singlepass.rendering.prefixes import Prefixes
from trl_singlepass.rendering.tokenization import HardBorders, hard_borders


def agent(turns):
    """One question, and that many calls of tools with results of 50 words."""
    question, call, result, _ = tool_chat()[:4]
    calls = [[call, {**result, "content": f"{turn} " + "of the tools " * 20}] for turn in range(turns)]
    return [question, *(message for pair in calls for message in pair), {"role": "assistant", "content": "Done."}]


@pytest.mark.parametrize("messages", [chat, agent])
def test_memory_grows_like_the_tree(messages, monkeypatch):
    monkeypatch.setattr(rendering_prefixes, "_ALL_COMPARED_UP_TO", 4)
    tokenizer, peaks, tokens = make_tokenizer("qwen3"), [], []
    render_samples(messages(2), tokenizer)
    for turns in (12, 60):
        tracemalloc.start()
        samples = render_samples(messages(turns), tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        tokens.append(len(PrefixTree.from_samples(samples)))
    num_sample_tokens = sum(map(len, samples))
    assert num_sample_tokens > 10 * tokens[1]
    assert peaks[1] / peaks[0] < 1.5 * tokens[1] / tokens[0]


def test_text_that_turns_share_is_encoded_once(monkeypatch):
    tokenizer, encoded = make_tokenizer("qwen3"), []
    encode = HardBorders.encode
    monkeypatch.setattr(HardBorders, "encode", lambda self, pieces: encoded.extend(pieces) or encode(self, pieces))
    messages = agent(60)
    hard_borders(tokenizer, tokenizer.chat_template)
    encoded.clear()
    render_samples(messages, tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert 0 < sum(map(len, encoded)) < 1.2 * len(text)


def test_renderings_that_no_later_turn_needs_are_forgotten():
    tokenizer = make_tokenizer("qwen3")
    prefixes = Prefixes.from_conversation(Conversation(chat(4)), tokenizer)
    texts = [prefixes.prompt(k) for k in (2, 4, 6)]
    prefixes.forget(4)
    assert min(length for length, _ in prefixes.known) == 6
    assert [prefixes.prompt(k) for k in (2, 4, 6)] == texts


def test_of_a_first_conversation_with_many_turns_a_few_renderings_are_compared(monkeypatch):
    calls = []
    render = transformers.tokenization_utils_base.render_jinja_template
    monkeypatch.setattr(
        transformers.tokenization_utils_base,
        "render_jinja_template",
        lambda *args, **kwargs: calls.append(kwargs) or render(*args, **kwargs),
    )
    monkeypatch.setattr(rendering_prefixes, "_compared", {})
    monkeypatch.setattr(rendering_prefixes, "_ALL_COMPARED_UP_TO", 8)
    render_samples(chat(70), make_tokenizer("qwen3"))  # 141 messages
    prompts = {len(call["conversations"][0]) for call in calls if call.get("add_generation_prompt")}
    assert prompts == {2, 4, 6, 8, 16, 32, 64, 128}
