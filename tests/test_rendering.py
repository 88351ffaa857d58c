"""Turns of conversations as samples: equal to `apply_chat_template`, whatever the template does with history."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import CONTROL_TOKENS, make_tokenizer, template_names, template_text
from tokenizers import AddedToken
from transformers import AutoTokenizer

from trl_singlepass.rendering import RenderingError, _length_within, render_row, render_samples
from trl_singlepass.rendering_reasoning import THINK, reasoning_tags
from trl_singlepass.rendering_tokens import common_length, hard_borders, tokenize


SHARED = Path(__file__).parents[2] / "shared"
DATA = ["llamafactory_reason_tool_use", "taubench_gpt4o_airline", "mathchat_follow_up_300"]


def call(name, **arguments):
    return {"id": f"call_{name[:4]}", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, parameter):
    schema = {"type": "object", "properties": {parameter: {"type": "string", "description": parameter}}}
    parameters = schema | {"required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": parameters}}


TOOLS = [tool("find_city", "city"), tool("read_user", "user_id")]
CHAT = [
    {"role": "user", "content": "Which one is it?"},
    {"role": "assistant", "reasoning_content": "We compare both.", "content": "The first one."},
    {"role": "user", "content": "Why so?"},
    {"role": "assistant", "reasoning_content": "We recall the rule.", "content": "Because of the rule."},
]
AGENT = [
    {"role": "user", "content": "Where is Mia?"},
    {"role": "assistant", "reasoning_content": "Look it up.", "tool_calls": [call("read_user", user_id="u7")]},
    {"role": "tool", "tool_call_id": "call_read", "name": "read_user", "content": "Mia, in the north"},
    {"role": "assistant", "reasoning_content": "Still vague.", "tool_calls": [call("find_city", city="Bodø")]},
    {"role": "tool", "tool_call_id": "call_find", "name": "find_city", "content": "Found"},
    {"role": "assistant", "reasoning_content": "Now I know.", "content": "In Bodø."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "reasoning_content": "The tool said so.", "content": "Quite sure."},
]


def without_reasoning(messages):
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def inline(messages):
    return [
        {"role": "assistant", "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
        if "reasoning_content" in m
        else m
        for m in messages
    ]


def as_blocks(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def completion(sample, tokenizer):
    return tokenizer.decode(sample.token_ids[sample.prompt_length :])


def prompt(sample, tokenizer):
    return tokenizer.decode(sample.token_ids[: sample.prompt_length])


# What each of TRL's templates does with (reasoning under a key, inline reasoning, reasoning and calls, calls): it
# renders everything ("ok"), or what it loses. "blocks": it takes content as a list of blocks only.
RENDERS_ALL = ("ok", "ok", "ok", "ok")
NO_REASONING = ("reasoning", "ok", "reasoning", "ok")
TEXT_ONLY = ("reasoning", "ok", "reasoning", "call")
OUTCOMES = {
    "cohere": TEXT_ONLY,
    "cohere2": TEXT_ONLY,
    "deepseek_r1_distill": ("ok", "ok", "call", "call"),
    "deepseekv3": ("ok", "ok", "reasoning", "ok"),  # its second tool call lacks the assistant's header
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
    "qwen3_5_nothink": RENDERS_ALL,
    "qwen3_5_think": RENDERS_ALL,
    "qwen3_6": RENDERS_ALL,
    "qwen3_8": RENDERS_ALL,
    "qwen3_instruct_2507": NO_REASONING,
    "qwen3_vl": NO_REASONING,
    "smolvlm": "blocks",
}
LOSSES = {"reasoning": "its reasoning is lost", "call": "its call of the tool 'read_user' is lost"}
CONVERSATIONS = [(CHAT, None), (inline(CHAT), None), (AGENT, TOOLS), (without_reasoning(AGENT), TOOLS)]


@pytest.mark.parametrize("name", template_names())
def test_every_template_renders_all_or_names_the_loss(name):
    tokenizer, expected = make_tokenizer(name), OUTCOMES.get(name.removesuffix("_training"))
    if expected is None:
        pytest.skip("a template of a newer TRL")
    if expected == "blocks":
        assert len(render_samples(as_blocks(without_reasoning(CHAT)), tokenizer)) == 2
        with pytest.raises(RenderingError, match=r"its answer|refuses the conversation"):
            render_samples(without_reasoning(CHAT), tokenizer)
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


WRITES_ITS_STOP = [
    *("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "gptoss", "nemotron_3_nano", "lfm2_2_5", "gemma4_v5"),
    *("muse_glimmer", "qwen3_5_nothink", "qwen3_training", "nemotron_3_ultra"),
]


@pytest.mark.parametrize("name", WRITES_ITS_STOP)
@pytest.mark.parametrize("messages", [CHAT, AGENT], ids=["chat", "agent"])
def test_samples_equal_apply_chat_template(name, messages):
    tokenizer, tools = make_tokenizer(name), TOOLS if messages is AGENT else None
    for sample in render_samples(messages, tokenizer, tools=tools):
        k = sample.message_index
        served = tokenizer.apply_chat_template(
            messages[:k], tools=tools, add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(messages[: k + 1], tools=tools, return_dict=False)
        assert sample.token_ids.tolist() == whole
        assert sample.prompt_length == common_length(np.array(served), np.array(whole))
        assert sample.loss_weights[sample.prompt_length :].all()


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


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_white_space_around_reasoning_is_the_templates_affair(key):
    tokenizer = make_tokenizer("qwen3")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", key: " spaced \n\nx \n", "content": " a "}]
    (sample,) = render_samples(messages, tokenizer)
    assert sample.token_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


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


@pytest.mark.parametrize(
    ("reasoning", "rendered"),
    [
        ("{% if m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}", "<think>We compare both.</think>"),
        ("{{ '<think>' if false }}", "<think>\nWe compare both.\n</think>\n\n"),
    ],
    ids=["another key only", "inline only"],
)
def test_moved_reasoning_stays_in_a_history_that_keeps_it(reasoning, rendered):
    tokenizer = make_tokenizer(None, HISTORY_KEPT.replace("REASONING", reasoning))
    first, second = render_samples(CHAT, tokenizer)
    assert np.array_equal(second.token_ids[: len(first)], first.token_ids)
    assert completion(first, tokenizer) == rendered + "The first one.<|im_end|>\n"


def test_comments_of_a_template_do_not_count():
    assert reasoning_tags("{#- drops <think> -#}{{ m.content }}") is None
    assert reasoning_tags("{#- drops [THINK] -#}{{ '<think>' }}") == THINK


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "deepseek_r1_distill", "lfm2_2_5", "nemotron_3_nano", "phi3"])
def test_prompts_with_inline_reasoning_are_as_served(name):
    tokenizer, messages = make_tokenizer(name), inline(CHAT)
    sample = render_samples(messages, tokenizer)[1]
    served = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert sample.token_ids[: sample.prompt_length].tolist() == served


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
    assert completion(render_samples(AGENT, tokenizer, tools=TOOLS)[0], tokenizer).endswith(ending)


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


def test_prompt_stays_as_served_where_a_token_reaches_over_the_border(qwen3_tokenizer):
    # Without reasoning, "<think>\n" is followed by "\n</think>", and "\n\n" is one token of Qwen3's tokenizer.
    qwen3_tokenizer.chat_template = template_text("qwen3_5_think")
    for sample in render_samples(without_reasoning(CHAT), qwen3_tokenizer):
        messages = without_reasoning(CHAT)[: sample.message_index]
        served = qwen3_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert sample.token_ids[: sample.prompt_length].tolist() == served
        assert completion(sample, qwen3_tokenizer).startswith("\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "tag"), [("qwen3", "\n</think>"), ("gptoss", "<|end|>"), ("gemma4_v5", "\n<channel|>")]
)
def test_reasoning_length_reaches_to_the_closing_tag(name, tag):
    tokenizer = make_tokenizer(name)
    sample = render_samples(CHAT, tokenizer)[0]
    reasoning = sample.token_ids[sample.prompt_length :][: sample.reasoning_length]
    assert tokenizer.decode(reasoning).endswith("We compare both." + tag)
    assert render_samples(without_reasoning(CHAT), tokenizer)[0].reasoning_length == 0


CLOCK = (
    "{{ strftime_now('%H:%M:%S.%f') }} {{ strftime_now('%d %B %Y') }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_clock_stands_still_over_one_conversation():
    tokenizer = make_tokenizer(None, CLOCK)
    first, second = render_samples(without_reasoning(CHAT), tokenizer)
    assert np.array_equal(second.token_ids[: len(first) - 1], first.token_ids[:-1])
    date = tokenizer.apply_chat_template(CHAT[:1], tokenize=False).split("<")[0].split(" ", 1)[1]
    assert date in prompt(first, tokenizer)  # the frozen clock formats as transformers does
    assert tokenizer.decode(first.token_ids).count("%") == 0


def test_templates_that_print_the_date_render_as_transformers_renders_them():
    tokenizer = make_tokenizer("gptoss")
    assert "Current date: 20" in prompt(render_samples(CHAT, tokenizer)[0], tokenizer)


def test_arguments_may_be_json_strings_or_dicts_for_any_template():
    as_json = json.loads(json.dumps(AGENT))
    for message in as_json:
        for item in message.get("tool_calls", []):
            item["function"]["arguments"] = json.dumps(item["function"]["arguments"], ensure_ascii=False)
    for name in ("qwen3", "glm4moe", "lfm2_2_5", "gptoss"):
        tokenizer = make_tokenizer(name)
        pairs = zip(*(render_samples(m, tokenizer, tools=TOOLS) for m in (AGENT, as_json)), strict=True)
        assert all(np.array_equal(left.token_ids, right.token_ids) for left, right in pairs)
    tokenizer = make_tokenizer("deepseekv3")
    left, right = (render_samples(without_reasoning(m)[:2], tokenizer, tools=TOOLS)[0] for m in (AGENT, as_json))
    assert completion(left, tokenizer) == completion(right, tokenizer)
    assert '{"user_id": "u7"}' in completion(left, tokenizer)


def test_template_kwargs_and_template_are_honoured():
    tokenizer = make_tokenizer("qwen3")
    sample = render_samples(without_reasoning(CHAT), tokenizer, enable_thinking=False)[0]
    assert prompt(sample, tokenizer).endswith("<think>\n\n</think>\n\n")
    sample = render_samples(CHAT, tokenizer, chat_template=template_text("lfm2_2_5"))[0]
    assert completion(sample, tokenizer) == COMPLETIONS["lfm2_2_5"]


def test_rendering_departing_from_its_prompt_follows_trl_and_warns_once(caplog):
    tokenizer = make_tokenizer("qwen3_5_nothink")
    tokenizer.chat_template += "{# met for the first time #}"
    for _ in range(2):
        sample = render_samples(CHAT, tokenizer)[0]
    assert prompt(sample, tokenizer).endswith("<|im_start|>assistant\n<think>")
    assert completion(sample, tokenizer) == "\nWe compare both.\n</think>\n\nThe first one.<|im_end|>\n"
    assert tokenizer.decode(sample.token_ids[sample.prompt_length :][: sample.reasoning_length]).endswith("</think>")


def test_warning_names_the_template(monkeypatch):
    messages = []
    monkeypatch.setattr("trl_singlepass.rendering.logger.warning_once", messages.append)
    render_samples(CHAT, make_tokenizer("qwen3_5_nothink"))
    assert "The chat template 'qwen3_5_nothink' renders prompts differently" in messages[0]
    assert len(set(messages)) == 1  # warning_once tells by the text


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe", "gemma4_v5"])
def test_shared_text_is_tokenised_once_to_the_same_tokens(name):
    tokenizer = make_tokenizer(name)
    borders = hard_borders(tokenizer, tokenizer.chat_template)
    assert borders.tokens
    texts = ["", "<", "plain  text\n", "<think>", " <think> <|im_end|>\n\n<|im_end|", "<|channel|><|channel>é<|end|>"]
    texts += [tokenizer.apply_chat_template(AGENT[:k], tokenize=False) for k in range(1, 9)]
    for ids, text in zip(tokenize(borders, texts), texts, strict=True):
        assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids


def test_tokenizers_with_a_prefix_space_are_not_cut():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁x": 1, "x": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens(["<a>"], special_tokens=True)
    assert hard_borders(tokenizer, "<a>").tokens == []


def test_borders_are_tokens_that_nothing_else_can_reach_over():
    tokenizer = make_tokenizer()
    added = ["<a>", "<b>", "x<b", "<c>", "<c><c>"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.add_tokens([AddedToken("<d>", normalized=True), AddedToken("<e>", normalized=False, lstrip=True)])
    assert hard_borders(tokenizer, "<a><b><c><d><e>").tokens == ["<a>"]


def test_token_that_reaches_over_the_closing_tag_counts_as_reasoning():
    assert _length_within(np.array([1, 2]), np.array([1, 2, 3])) == 2
    assert _length_within(np.array([1, 9]), np.array([1, 2, 3])) == 2


def test_samples_do_not_depend_on_process():
    tokenizer = pickle.loads(pickle.dumps(make_tokenizer("glm4moe")))
    here, there = render_samples(CHAT, make_tokenizer("glm4moe")), render_samples(CHAT, tokenizer)
    assert all(np.array_equal(left.token_ids, right.token_ids) for left, right in zip(here, there, strict=True))


@pytest.fixture(scope="module")
def qwen3_tokenizer():
    folder = SHARED / "tokenizers" / "qwen3"
    if not folder.exists():
        pytest.skip("no Qwen3 tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(CONTROL_TOKENS, special_tokens=True)  # of the other templates
    return tokenizer


@pytest.mark.parametrize("file", DATA)
@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe"])
def test_real_conversations_equal_apply_chat_template(file, name, qwen3_tokenizer):
    path = SHARED / "data" / f"{file}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    qwen3_tokenizer.chat_template = template_text(name)
    rows = [json.loads(line) for line in path.read_text().splitlines()[:12]]
    for row in rows:
        if any(len(message.get("tool_calls") or []) > 1 for message in row["messages"]) and name == "gptoss":
            continue  # it renders one call a message
        tools = row.get("tools")
        for sample in render_samples(row["messages"], qwen3_tokenizer, tools=tools)[-4:]:
            messages = with_dict_arguments(row["messages"][: sample.message_index + 1])
            whole = qwen3_tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
            assert sample.token_ids.tolist()[: len(whole)] == whole
            assert len(sample) - len(whole) == (name == "glm4moe")  # its stop token


def with_dict_arguments(messages):
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for item in message.get("tool_calls") or []:
            arguments = item["function"]["arguments"]
            item["function"]["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
    return messages


def test_row_errors_name_the_row():
    with pytest.raises(RenderingError, match=r"^Row 7: Message 1 cannot be rendered with the chat template 'qwen3'"):
        render_row({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, make_tokenizer(), row_index=7)
