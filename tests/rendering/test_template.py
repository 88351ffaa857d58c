"""What each chat template does with a turn: rendered whole, built, or refused by name."""

import numpy as np
import pytest

from support.chat_tokenizers import make_tokenizer, template_names
from support.conversations import AGENT, AGENT_TOOLS, CHAT, as_blocks, completion, inline, without_reasoning
from trl_singlepass.rendering.samples import RenderingError, render_samples


# What each of TRL's templates does with (reasoning under a key, inline reasoning, reasoning and calls, calls): it
# renders everything ("ok"), or what it loses. "blocks": it takes content as
# a list of blocks only, so strings become lists.
RENDERS_ALL = ("ok", "ok", "ok", "ok")
NO_REASONING = ("reasoning", "ok", "reasoning", "ok")
TEXT_ONLY = ("reasoning", "ok", "reasoning", "call")
OUTCOMES = {
    "cohere": TEXT_ONLY,
    "cohere2": TEXT_ONLY,
    "deepseek_r1_distill": ("ok", "ok", "call", "call"),
    "deepseekv3": ("ok", "ok", "reasoning", "prompt"),  # its second tool call does not continue the served prompt
    "diffusion_gemma": RENDERS_ALL,
    "gemma": TEXT_ONLY,
    "gemma3": TEXT_ONLY,
    "gemma4": RENDERS_ALL,
    "gemma4_v2": RENDERS_ALL,
    "gemma4_v3": RENDERS_ALL,
    "gemma4_v4": RENDERS_ALL,
    "gemma4_v5": RENDERS_ALL,
    "glm4moe": RENDERS_ALL,
    "gptoss": RENDERS_ALL,
    "idefics3": "blocks",
    "lfm2": TEXT_ONLY,
    "lfm2_2_5": RENDERS_ALL,
    "lfm2_2_5_v2": RENDERS_ALL,
    "lfm2_2_5_vl": RENDERS_ALL,
    "lfm2_v2": NO_REASONING,
    "llama3": TEXT_ONLY,
    "llama3_1": NO_REASONING,
    "llama3_2": NO_REASONING,
    "llava_next": "blocks",
    "muse_glimmer": RENDERS_ALL,
    "nemotron_3_5_lightning": RENDERS_ALL,
    "nemotron_3_nano": RENDERS_ALL,
    "nemotron_3_super": RENDERS_ALL,
    "nemotron_3_ultra": RENDERS_ALL,
    "phi3": TEXT_ONLY,
    "phi3_5": TEXT_ONLY,
    "qwen2_5": NO_REASONING,
    "qwen2_5_vl": TEXT_ONLY,
    "qwen3": RENDERS_ALL,
    "qwen3_5_nothink": ("closed", "closed", "closed", "ok"),
    "qwen3_5_think": RENDERS_ALL,
    "qwen3_6": RENDERS_ALL,
    "qwen3_8": RENDERS_ALL,
    "qwen3_instruct_2507": NO_REASONING,
    "qwen3_vl": NO_REASONING,
    "smolvlm": "blocks",
}
LOSSES = {
    "reasoning": "its reasoning is lost",
    "call": "its call of the tool 'read_user' is lost",
    "closed": "its prompt closes the reasoning",
    "prompt": "its prompt begins the answer with",
}
CONVERSATIONS = [(CHAT, None), (inline(CHAT), None), (AGENT, AGENT_TOOLS), (without_reasoning(AGENT), AGENT_TOOLS)]


@pytest.mark.parametrize("name", template_names())
def test_every_template_renders_all_or_names_the_loss(name):
    tokenizer, expected = make_tokenizer(name), OUTCOMES.get(name.removesuffix("_training"))
    if expected is None:
        pytest.skip("a template of a newer TRL")
    if expected == "blocks":
        forms = (without_reasoning(CHAT), as_blocks(without_reasoning(CHAT)))
        strings, blocks = (render_samples(messages, tokenizer) for messages in forms)
        assert len(strings) == 2
        assert all(
            np.array_equal(left.token_ids, right.token_ids) for left, right in zip(strings, blocks, strict=True)
        )
        return
    for (messages, tools), outcome in zip(CONVERSATIONS, expected, strict=True):
        if outcome == "ok":
            samples = render_samples(messages, tokenizer, tools=tools)
            assert [s.message_index for s in samples] == [
                k for k, m in enumerate(messages) if m["role"] == "assistant"
            ]
        else:
            with pytest.raises(RenderingError, match=LOSSES[outcome]) as error:
                render_samples(messages, tokenizer, tools=tools)
            assert f"'{name}'" in str(error.value)
            assert str(error.value).startswith("Message ")


COMPLETIONS = {
    "qwen3": "<think>\nWe compare both.\n</think>\n\nThe first one.<|im_end|>\n",
    "qwen3_5_think": "We compare both.\n</think>\n\nThe first one.<|im_end|>\n",
    "qwen3_8": "We compare both.\n</think>\n\nThe first one.<|im_end|>\n",
    "deepseek_r1_distill": "We compare both.\n</think>\n\nThe first one.<\uff5cend\u2581of\u2581sentence\uff5c>",
    "gptoss": "<|channel|>analysis<|message|>We compare both.<|end|><|start|>assistant<|channel|>final<|message|>"
    "The first one.<|return|>",
    "glm4moe": "\n<think>We compare both.</think>\nThe first one.<|user|>",
    "nemotron_3_nano": "We compare both.\n</think>\nThe first one.<|im_end|>\n",
    "lfm2_2_5": "<think>We compare both.</think>The first one.<|im_end|>\n",
    "gemma4": "<|channel>thought\nWe compare both.\n<channel|>The first one.<turn|>\n",
    "gemma4_v5": "<|channel>thought\nWe compare both.\n<channel|>The first one.<turn|>\n",
    "muse_glimmer": " to=self<|message|>We compare both.<|eom|><|start|>assistant to=user<|message|>The first one."
    "<|eot|>",
}


@pytest.mark.parametrize("name", COMPLETIONS)
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_completion_is_what_the_model_generates(name, key):
    tokenizer = make_tokenizer(name)
    messages = [{key if k == "reasoning_content" else k: v for k, v in message.items()} for message in CHAT]
    assert completion(render_samples(messages, tokenizer)[0], tokenizer) == COMPLETIONS[name]


@pytest.mark.parametrize("name", COMPLETIONS)
def test_inline_reasoning_says_the_same(name):
    tokenizer = make_tokenizer(name)
    for under_key, between_tags in zip(
        render_samples(CHAT, tokenizer), render_samples(inline(CHAT), tokenizer), strict=True
    ):
        squeezed = ["".join(completion(sample, tokenizer).split()) for sample in (under_key, between_tags)]
        assert squeezed[0] == squeezed[1]


QWQ = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SOLAR = QWQ.replace(
    "{{ m.content }}", "{% if m.reasoning %}<think>\n{{ m.reasoning }}\n</think>\n\n{% endif %}{{ m.content }}"
)
# Leaves an empty block in its last turn and keeps tool calls' reasoning, as Kimi-K2-Thinking does.
KIMI = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|message|>"
    "{% if m.role == 'assistant' %}<think>{% if m.tool_calls %}{{ m.reasoning_content }}{% endif %}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|message|>{% endif %}"
)
# DeepSeek-V3.1 with thinking: the prompt opens the reasoning, and history shows only its end.
DEEPSEEK_V31 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|></think>{{ m.content }}<eos>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("chat_template", "kwargs", "expected"),
    [
        (QWQ, {}, "We compare both.\n</think>\n\nThe first one.<|im_end|>\n"),
        (SOLAR, {}, "We compare both.\n</think>\n\nThe first one.<|im_end|>\n"),
        (KIMI, {}, "<think>We compare both.</think>The first one.<|im_end|>"),
        (
            KIMI.replace("</think>", "\n\n</think>\n"),
            {},
            "<think>\nWe compare both.\n</think>\nThe first one.<|im_end|>",
        ),
        (DEEPSEEK_V31, {"thinking": True}, "We compare both.</think>The first one.<eos>"),
    ],
    ids=["inline only", "another key only", "empty block", "empty block on lines", "bare closing tag"],
)
def test_reasoning_is_moved_or_built_as_the_template_shows_it(chat_template, kwargs, expected):
    tokenizer = make_tokenizer(None, chat_template)
    sample = render_samples(CHAT, tokenizer, **kwargs)[0]
    assert completion(sample, tokenizer) == expected
    served = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False, **kwargs)
    assert sample.token_ids[: sample.prompt_length].tolist() == served


HISTORY_KEPT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\nREASONING{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_moved_to_another_key_stays_in_a_history_that_keeps_it():
    reasoning = "{% if m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}"
    tokenizer = make_tokenizer(None, HISTORY_KEPT.replace("REASONING", reasoning))
    first, second = render_samples(CHAT, tokenizer)
    assert np.array_equal(second.token_ids[: len(first)], first.token_ids)
    assert completion(first, tokenizer) == "<think>We compare both.</think>The first one.<|im_end|>\n"


def test_history_is_what_the_template_makes_of_the_messages_as_they_are():
    # It reads reasoning in the content alone, and keeps it there: under a key, the history shows none.
    tokenizer = make_tokenizer(None, HISTORY_KEPT.replace("REASONING", "{{ '<think>' if false }}"))
    first, second = render_samples(CHAT, tokenizer)
    assert completion(first, tokenizer) == "<think>\nWe compare both.\n</think>\n\nThe first one.<|im_end|>\n"
    served = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True, return_dict=False)
    assert second.token_ids[: second.prompt_length].tolist() == served
    in_content = render_samples(inline(CHAT), tokenizer)
    assert np.array_equal(in_content[1].token_ids[: len(in_content[0])], in_content[0].token_ids)
