"""What a template loses of a message is named with the way out, and nothing that it renders counts as lost."""

import hashlib

import numpy as np
import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import BOOKING_TOOLS, call
from trl_singlepass.rendering.checks import template_name
from trl_singlepass.rendering.samples import RenderingError, render_example, render_samples


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


IDS_FOR_NAMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.id }} "
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_names_tools_by_the_ids_of_their_calls_asks_for_names_in_the_ids():
    tokenizer = make_tokenizer(chat_template=IDS_FOR_NAMES)

    def messages(call_id):
        return assistant(content="", tool_calls=[{**call("find", name="Mia"), "id": call_id}])

    with pytest.raises(
        RenderingError, match=r"id 'call_7' in its place: put the name into it, as in 'functions\.find:0'"
    ):
        render_example({"messages": messages("call_7")}, tokenizer)
    (sample,) = render_example({"messages": messages("functions.find:0")}, tokenizer)
    assert tokenizer.decode(sample.token_ids).endswith(
        '<tool_call>functions.find:0 {"name": "Mia"}</tool_call><|im_end|>\n'
    )


def test_a_template_is_named_as_in_trl_or_by_its_hash_and_never_by_a_folder(tmp_path):
    tokenizer = make_tokenizer("qwen3")
    own = tokenizer.chat_template + "{# changed #}"
    code = hashlib.sha256(own.encode()).hexdigest()[:8]
    for source in (str(tmp_path), "Qwen/Qwen3-8B", ""):
        tokenizer.name_or_path = source
        assert template_name(tokenizer, tokenizer.chat_template) == "chat template 'qwen3'"
        expected = f"Qwen/Qwen3-8B ({code})" if source.startswith("Qwen") else code
        assert template_name(tokenizer, own) == f"chat template '{expected}'"
    assert template_name(tokenizer, own + " ") != template_name(tokenizer, own)
