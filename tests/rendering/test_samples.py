"""Turns of conversations as samples: equal to `apply_chat_template`, whatever the template does with history."""

import json

import pytest

from support.chat_tokenizers import make_tokenizer, template_text
from support.conversations import AGENT, AGENT_TOOLS, CHAT, completion, prompt, without_reasoning
from support.public_data import CONVERSATIONS, FOLDER, released_qwen3_tokenizer
from trl_singlepass.rendering.samples import RenderingError, render_samples
from trl_singlepass.trees.sample import CompletionKind


WRITES_ITS_STOP = [
    *("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "gptoss", "nemotron_3_nano", "lfm2_2_5", "gemma4_v5"),
    *("muse_glimmer", "qwen3_training", "nemotron_3_ultra"),
]


@pytest.mark.parametrize("name", WRITES_ITS_STOP)
@pytest.mark.parametrize("messages", [CHAT, AGENT], ids=["chat", "agent"])
def test_samples_equal_apply_chat_template(name, messages):
    tokenizer, tools = make_tokenizer(name), AGENT_TOOLS if messages is AGENT else None
    for sample in render_samples(messages, tokenizer, tools=tools):
        k = sample.message_index
        served = tokenizer.apply_chat_template(
            messages[:k], tools=tools, add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(messages[: k + 1], tools=tools, return_dict=False)
        assert sample.token_ids[: sample.prompt_length].tolist() == served
        if sample.kind == CompletionKind.AS_SERVED:
            assert sample.token_ids.tolist() == whole
        else:  # the history of the whole is another one
            own = sample.token_ids[sample.prompt_length :].tolist()
            assert whole[-len(own) :] == own
        assert sample.loss_weights[sample.prompt_length :].all()


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


def test_template_kwargs_and_template_are_honoured():
    tokenizer = make_tokenizer("qwen3")
    sample = render_samples(without_reasoning(CHAT), tokenizer, enable_thinking=False)[0]
    assert prompt(sample, tokenizer).endswith("<think>\n\n</think>\n\n")
    sample = render_samples(CHAT, tokenizer, chat_template=template_text("lfm2_2_5"))[0]
    assert completion(sample, tokenizer) == "<think>We compare both.</think>The first one.<|im_end|>\n"


def test_prompts_that_close_the_reasoning_are_served_as_they_are():
    tokenizer, messages = make_tokenizer("qwen3_5_nothink"), without_reasoning(CHAT)
    sample = render_samples(messages, tokenizer)[0]
    assert prompt(sample, tokenizer).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert completion(sample, tokenizer) == "The first one.<|im_end|>\n"
    with pytest.raises(RenderingError, match="its prompt closes the reasoning before the message can give its own"):
        render_samples(CHAT, tokenizer)


@pytest.fixture(scope="module")
def qwen3_tokenizer():
    return released_qwen3_tokenizer()


@pytest.mark.parametrize("file", CONVERSATIONS)
@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe"])
def test_real_conversations_equal_apply_chat_template(file, name, qwen3_tokenizer):
    path = FOLDER / "data" / f"{file}.jsonl"
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
            served = qwen3_tokenizer.apply_chat_template(
                messages[:-1], tools=tools, add_generation_prompt=True, return_dict=False
            )
            assert sample.token_ids[: sample.prompt_length].tolist() == served
            own = sample.token_ids[sample.prompt_length :].tolist()
            added = int(name == "glm4moe")  # its stop token
            assert own[: len(own) - added] == whole[len(whole) - len(own) + added :]
            if sample.kind == CompletionKind.AS_SERVED:
                assert len(served) + len(own) - added == len(whole)


def with_dict_arguments(messages):
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for item in message.get("tool_calls") or []:
            arguments = item["function"]["arguments"]
            item["function"]["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
    return messages
