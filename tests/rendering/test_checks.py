"""What a template loses of a message is named with the way out, and nothing that it renders counts as lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.chat_tokenizers import make_tokenizer
from support.conversations import BOOKING_TOOLS, call
from trl_singlepass.rendering.checks import without_whole, words_in
from trl_singlepass.rendering.samples import RenderingError, render_samples


PLAIN = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def assistant(**fields):
    return [{"role": "user", "content": "Hi."}, {"role": "assistant", **fields}]


BAD_WITH_TEMPLATE = {
    "template raises": (
        "qwen3_5_think",
        [{"role": "system", "content": "Be brief."}, *PLAIN[1:]],
        "Message 1 .* the template refuses the conversation up to it: .*No user query found",
    ),
    "no place for reasoning": (
        "llama3",
        assistant(reasoning_content="We think.", content="Hello."),
        r"its reasoning is lost: the template has no place for it\. Write it into 'content'",
    ),
    "no place for reasoning, but a comment on it": (
        "qwen3_instruct_2507_training",
        assistant(thinking="We think.", content="Hello."),
        "its reasoning is lost: the template has no place for it",
    ),
    "text beside calls": (
        "muse_glimmer",
        assistant(content="Let me look.", tool_calls=[call("find", name="Mia")]),
        "its answer 'Let me look.' is lost or changed. Does the template take text beside tool calls",
    ),
    "tool calls": (
        "lfm2",
        assistant(content="I call find.", tool_calls=[call("find", name="Mia")]),
        "its call of the tool 'find' is lost. Use a template that renders tool calls",
    ),
    "argument of a second call": (
        "gptoss",
        assistant(content="", tool_calls=[call("find", name="Mia"), call("find", name="Nils")]),
        "the argument 'Nils' of its call of 'find' is lost or changed. Give each call a message of its own",
    ),
}


@pytest.mark.parametrize("case", BAD_WITH_TEMPLATE)
def test_losses_are_named(case):
    name, messages, message = BAD_WITH_TEMPLATE[case]
    with pytest.raises(RenderingError, match=message):
        render_samples(messages, make_tokenizer(name), tools=BOOKING_TOOLS if case == "tool calls" else None)


def test_an_answer_that_only_the_reasoning_holds_is_lost():
    chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.reasoning_content or m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RenderingError, match="its answer '18' is lost"):
        render_samples(
            assistant(reasoning_content="9 times 2 is 18.", content="18"), make_tokenizer(None, chat_template)
        )


@pytest.mark.parametrize("value", ["a\n\"b\" 'c'", 3, 2.5, True, None, ["x", {"y": "z"}], "<b> é"])
@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "glm4moe", "gptoss", "lfm2_v2", "gemma4_v5", "muse_glimmer"]
)
def test_arguments_of_every_type_are_recognised(name, value):
    messages = assistant(content="", tool_calls=[call("find", name=value)])
    (sample,) = render_samples(messages, make_tokenizer(name), tools=BOOKING_TOOLS)
    assert np.any(sample.loss_weights)


WITH_PLANTED_WORDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' and loop.last %}"
    "PLANTED{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "planted", [" {{ messages[0].content }}", "{{ messages[1].content }}", " {{ messages | tojson }}"]
)
def test_words_of_other_messages_in_a_completion_are_refused(planted):
    tokenizer = make_tokenizer(chat_template=WITH_PLANTED_WORDS.replace("PLANTED", planted))
    messages = [
        {"role": "user", "content": "Where does Rowan live?"},
        {"role": "assistant", "content": "In Oslo"},
        {"role": "user", "content": "And Mia?"},
        {"role": "assistant", "content": "There\nas well"},
    ]
    with pytest.raises(RenderingError, match="its completion holds words of other messages"):
        render_samples(messages, tokenizer)
    render_samples(messages, make_tokenizer(chat_template=WITH_PLANTED_WORDS.replace("PLANTED", "")))


@given(st.lists(st.sampled_from(["ab", "abab", "c", "_", " ", "\n", "é", "7"]), max_size=12).map("".join), st.data())
def test_words_are_explained_by_parts_of_a_text_as_by_all_of_them(text, data):
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    parts = [text[start:end], "ab", "c "]
    own = words_in(" ".join(parts))
    assert words_in(without_whole(text, parts)) - own == words_in(text) - own
