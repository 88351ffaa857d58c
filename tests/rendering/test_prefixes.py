"""Every prefix of a conversation rendered fast: the text of `apply_chat_template`, in a sandbox as strict."""

import pytest
import transformers.tokenization_utils_base

from support.chat_tokenizers import TEMPLATES, make_tokenizer
from support.conversations import AGENT, text_or_error
from trl_singlepass.rendering import prefixes as rendering_prefixes
from trl_singlepass.rendering.conversation import Conversation
from trl_singlepass.rendering.prefixes import Prefixes
from trl_singlepass.rendering.samples import render_samples
from trl_singlepass.rendering.template import compiled_template


TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": {}}}]


def chat(turns):
    pair = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "reasoning_content": "Rowan.", "content": "Aspen."},
    ]
    return [{"role": "system", "content": "Be brief."}, *pair * turns]


@pytest.fixture(autouse=True)
def nothing_compared(monkeypatch):
    monkeypatch.setattr(rendering_prefixes, "_compared", {})


@pytest.fixture
def public_renderings(monkeypatch):
    """Every call of transformers' own rendering."""
    calls = []
    render = transformers.tokenization_utils_base.render_jinja_template

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return render(*args, **kwargs)

    monkeypatch.setattr(transformers.tokenization_utils_base, "render_jinja_template", counted)
    return calls


@pytest.mark.parametrize("messages", [chat(3), AGENT], ids=["chat", "agent"])
@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_beginnings_equal_apply_chat_template(name, messages):
    tokenizer, conversation = make_tokenizer(name), Conversation(messages, TOOLS, {"enable_thinking": True})
    for again in (False, True):  # the first conversation is compared as it is rendered, the second is not
        prefixes = Prefixes.from_conversation(conversation, tokenizer)
        assert prefixes.compares == (prefixes.compiled is not None and not again)
        render, adapted = prefixes.template.render, prefixes.messages
        for k in range(1, len(adapted)):
            assert text_or_error(prefixes.prompt, k) == text_or_error(render, adapted[:k], True)
            assert text_or_error(prefixes.context, k) == text_or_error(render, adapted[:k])
            own = prefixes.trained.get(k, adapted[k])
            assert text_or_error(prefixes.through, k) == text_or_error(render, [*adapted[:k], own])
        last = {"role": "assistant", "content": "Oak."}
        assert text_or_error(prefixes.through, len(adapted) - 1, last) == text_or_error(render, [*adapted[:-1], last])
    if not text_or_error(render, adapted).endswith(")"):
        assert prefixes.compiled is not None, "rendered fast"


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe", "nemotron_3_nano", "gemma4_v5", "lfm2_2_5"])
def test_transformers_renders_as_often_for_many_turns_as_for_few(name, public_renderings):
    tokenizer = make_tokenizer(name)
    render_samples(chat(2), tokenizer)  # the first of a template is compared
    calls = []
    for turns in (2, 12):
        public_renderings.clear()
        render_samples(chat(turns), tokenizer)
        calls.append(len(public_renderings))
    assert calls == [1, 1], "one to see the messages"


def test_the_first_messages_of_a_shape_are_compared(monkeypatch):
    tokenizer = make_tokenizer("qwen3")
    expected = render_samples(AGENT, tokenizer)
    monkeypatch.setattr(rendering_prefixes, "_compared", {})
    # Wrong where a tool is called, which the first conversation does not do.
    wrong = "{% if messages | selectattr('tool_calls', 'defined') | list %}wrong{% endif %}" + tokenizer.chat_template
    monkeypatch.setattr(rendering_prefixes, "compiled_template", lambda _: compiled_template(wrong))
    render_samples(chat(3), tokenizer)
    samples = render_samples(AGENT, tokenizer)
    assert [sample.token_ids.tolist() for sample in samples] == [sample.token_ids.tolist() for sample in expected]


def test_another_text_is_never_taken(monkeypatch, public_renderings):
    tokenizer = make_tokenizer("qwen3")
    expected = render_samples(chat(4), tokenizer)
    # Wrong in prompts alone, so that the comparison of the longest rendering cannot see it.
    wrong = "{% if add_generation_prompt %}wrong{% else %}" + tokenizer.chat_template + "{% endif %}"
    monkeypatch.setattr(rendering_prefixes, "compiled_template", lambda _: compiled_template(wrong))
    monkeypatch.setattr(rendering_prefixes, "_compared", {})
    for _ in range(2):
        public_renderings.clear()
        samples = render_samples(chat(4), tokenizer)
        for sample, right in zip(samples, expected, strict=True):
            assert sample.token_ids.tolist() == right.token_ids.tolist()
    assert len(public_renderings) == 8, "the second conversation is rendered by transformers alone"


def test_a_template_that_never_says_the_same_is_left_to_transformers():
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template += "{{ range(1000000) | random }}"
    assert Prefixes.from_conversation(Conversation(chat(2)), tokenizer).compiled is None


def test_a_tokenizer_with_a_way_of_its_own_is_left_to_it(monkeypatch):
    tokenizer = make_tokenizer("qwen3")
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: "its own")
    assert Prefixes.from_conversation(Conversation(chat(2)), tokenizer).through(2) == "its own"


@pytest.mark.parametrize("name", ["continue_final_message", "not an identifier"])
def test_arguments_that_no_template_sees_are_left_to_transformers(name):
    conversation = Conversation(chat(2), template_kwargs={name: False})
    assert Prefixes.from_conversation(conversation, make_tokenizer("qwen3")).compiled is None
