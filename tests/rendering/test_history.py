"""History policies: what a turn's context holds of the reasoning of earlier turns."""

import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, tool_chat
from trl_singlepass.rendering.conversation import Conversation, RenderingError
from trl_singlepass.rendering.history import render_with_history
from trl_singlepass.trees.prefix_tree import PrefixTree


def render(messages, name, history):
    tokenizer = make_tokenizer(name)
    samples = render_with_history(Conversation(messages), tokenizer, history)
    texts = [
        (
            tokenizer.decode(sample.token_ids[: sample.prompt_length]),
            tokenizer.decode(sample.token_ids[sample.prompt_length :]),
        )
        for sample in samples
    ]
    return samples, texts


def reasonings(messages):
    return [message["reasoning_content"] for message in messages if message["role"] == "assistant"]


STRIPPING = ["qwen3", "qwen3_5_think", "qwen3_6", "nemotron_3_nano", "lfm2_2_5", "deepseek_r1_distill"]


@pytest.mark.parametrize("name", [*STRIPPING, "qwen3_8"])
@pytest.mark.parametrize("history", ["template", "keep", "strip"])
def test_every_policy_trains_all_reasoning_and_differs_in_the_context_only(name, history):
    messages = chat(3)
    _, texts = render(messages, name, history)
    thoughts = reasonings(messages)
    kept = history == "keep" or (history == "template" and name == "qwen3_8")
    for turn, (prompt, completion) in enumerate(texts):
        assert thoughts[turn] in completion
        assert [thought in prompt for thought in thoughts[:turn]] == [kept] * turn


@pytest.mark.parametrize("name", ["qwen3", "qwen3_8"])
def test_kept_history_is_one_chain(name):
    samples, _ = render(chat(4), name, "keep")
    tree = PrefixTree.from_samples(samples)
    assert len(tree) == max(map(len, samples))


def test_strip_removes_the_reasoning_of_tool_steps_as_well():
    messages = tool_chat()
    _, texts = render(messages, "qwen3", "strip")
    thoughts = reasonings(messages)
    assert thoughts[0] not in texts[1][0]
    _, texts = render(messages, "qwen3", "template")
    assert thoughts[0] in texts[1][0]


def test_inline_reasoning_is_stripped_too():
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nFirst thought.\n</think>\n\nOne."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>\nSecond thought.\n</think>\n\nTwo."},
    ]
    _, texts = render(messages, "qwen3_8", "strip")
    assert "First thought." not in texts[1][0]
    assert "Second thought." in texts[1][1]


def test_a_template_that_cannot_keep_reasoning_is_refused():
    with pytest.raises(RenderingError, match=r"history='keep' needs a chat template that can render.*has no switch"):
        render(chat(2), "glm4moe", "keep")


def test_a_conversation_without_a_turn_says_so():
    with pytest.raises(RenderingError, match="at least one assistant message"):
        render([{"role": "user", "content": "Hello?"}], "qwen3", "strip")
