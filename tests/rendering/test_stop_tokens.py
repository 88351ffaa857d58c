"""Every completion ends in the token at which its model stops, whatever the template writes there."""

import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import AGENT, AGENT_TOOLS, CHAT, completion, without_reasoning
from trl_singlepass.rendering.samples import RenderingError, render_samples


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("glm4moe", "</tool_call><|observation|>"),
        ("gptoss", "<|call|>"),
        ("gemma4_v5", "<tool_call|><|tool_response>"),
        ("qwen3", "</tool_call><|im_end|>\n"),
        ("lfm2_2_5", "<|tool_call_end|><|im_end|>\n"),
    ],
)
def test_tool_calls_end_in_a_stop_token(name, ending):
    tokenizer = make_tokenizer(name)
    assert completion(render_samples(AGENT, tokenizer, tools=AGENT_TOOLS)[0], tokenizer).endswith(ending)


@pytest.mark.parametrize(
    ("closing", "stop"), [("<|tool_call_end|>", "<|user|>"), ("</s>", ""), ("<think>", "<|user|>")]
)
def test_tokens_that_close_a_tool_call_are_no_stop_tokens(closing, stop):
    chat_template = (
        "{% for m in messages %}<|{{ m.role if m.role == 'assistant' else 'user' }}|>{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}CLOSING{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer("llava_next", chat_template.replace("CLOSING", closing))  # its EOS is </s>
    text = completion(render_samples(without_reasoning(AGENT), tokenizer)[0], tokenizer)
    assert text.endswith('{"user_id": "u7"}' + closing + stop)


def test_eos_ends_answers_where_history_shows_no_token():
    body = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    tokenizer = make_tokenizer("llama3", body + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert completion(render_samples(without_reasoning(CHAT), tokenizer)[0], tokenizer) == "The first one.<|eot_id|>"
    tokenizer.eos_token = None
    with pytest.raises(RenderingError, match="no stop token after it and the tokenizer has no EOS token"):
        render_samples(without_reasoning(CHAT), tokenizer)


def test_a_call_without_arguments_gets_its_stop_and_no_markup():
    call = {"type": "function", "function": {"name": "list_airports", "arguments": {}}}
    messages = [{"role": "user", "content": "Where to?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tokenizer = make_tokenizer("glm4moe")
    (sample,) = render_samples(messages, tokenizer)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.endswith("</tool_call>")
    assert tokenizer.decode(sample.token_ids) == rendered + "<|observation|>"


def test_an_empty_answer_gets_the_stop_that_the_template_writes_after_text_alone():
    body = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(None, body)
    (sample,) = render_samples([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": ""}], tokenizer)
    assert completion(sample, tokenizer) == "<|im_end|>"
