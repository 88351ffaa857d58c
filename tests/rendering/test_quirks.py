"""Quirks of public templates, each in a small one: the completion is exactly what the model writes."""

import pytest

from support.chat_templates import HARD_TEMPLATES
from support.conversations import CHAT, completion, prompt
from support.second_opinion import TOOLS, tokenizer_for
from trl_singlepass.rendering.conversation import RenderingError
from trl_singlepass.rendering.samples import render_samples


USER = {"role": "user", "content": "Juniper"}
CALL = {"id": "call00000", "type": "function", "function": {"name": "lookup", "arguments": {"key": "Maple"}}}
RESULT = {"role": "tool", "name": "lookup", "tool_call_id": "call00000", "content": "Linden"}
CALL_TEXT = '<tool_call>lookup{"key": "Maple"}</tool_call>'


def tokenizer_of(name):
    hard = HARD_TEMPLATES[name]
    return tokenizer_for(None, hard.source, hard.stops, hard.tokens)


def assistant(content="Aspen", **fields):
    return {"role": "assistant", "content": content, **fields}


def trained(name, *messages, **kwargs):
    tokenizer = tokenizer_of(name)
    return [completion(sample, tokenizer) for sample in render_samples([USER, *messages], tokenizer, **kwargs)]


THOUGHT = [
    {"reasoning_content": "a > b [1]"},
    {"thinking": "a > b [1]"},
    {"content": [{"type": "thinking", "thinking": "a > b [1]"}, {"type": "text", "text": "Aspen"}]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "a > b [1]"}]}, "Aspen"]},
    {"content": "[THINK]\na > b [1]\n[/THINK]Aspen"},
    {"content": "[THINK]a > b [1][/THINK]Aspen"},
    {"content": "<think>\na > b [1]\n</think>\n\nAspen"},
]


@pytest.mark.parametrize("fields", THOUGHT)
def test_marks_that_end_in_no_angle_bracket(fields):
    assert trained("marks in parts", assistant(**fields)) == ["[THINK]a > b [1][/THINK]Aspen</s>"]


def test_marks_in_strings_stand_where_the_model_writes_them():
    fields = {"reasoning_content": "a > b [1]"}
    assert trained("marks in strings", assistant(**fields)) == ["[THINK]a > b [1][/THINK]Aspen</s>"]
    calls = assistant("", tool_calls=[CALL], **fields)
    assert trained("marks in strings", calls) == [f"[THINK]a > b [1][/THINK]{CALL_TEXT}</s>"]


@pytest.mark.parametrize("name", ["strings only", "round dropped", "no stop", "clock"])
def test_a_part_that_holds_reasoning_is_never_printed_as_a_list(name):
    parts = [{"type": "thinking", "thinking": "Rowan"}, {"type": "text", "text": "Aspen"}]
    assert trained(name, assistant(parts)) == trained(name, assistant(reasoning_content="Rowan"))


def test_a_part_that_holds_reasoning_is_refused_by_a_template_without_a_place_for_it():
    tokenizer = tokenizer_for("llama3", None, None)
    parts = [{"type": "thinking", "thinking": "Rowan"}, {"type": "text", "text": "Aspen"}]
    with pytest.raises(RenderingError, match="reasoning"):
        render_samples([USER, assistant(parts)], tokenizer)


@pytest.mark.parametrize("content", ["", "Hazel"])
@pytest.mark.parametrize("spelling", ["key", "inline"])
def test_inline_reasoning_beside_calls_is_not_written_behind_a_closed_block(content, spelling):
    inline = f"<think>\nRowan\n</think>\n\n{content}"
    fields = {"content": content, "reasoning_content": "Rowan"} if spelling == "key" else {"content": inline}
    texts = trained("inline in answers only", assistant(**fields, tool_calls=[CALL]), RESULT, assistant("Birch"))
    assert texts == [f"Rowan</think>{content}{CALL_TEXT}<|im_end|>", "</think>Birch<|im_end|>"]


@pytest.mark.parametrize("content", ["", None])
def test_the_mark_that_closes_reasoning_is_no_stop_even_if_it_is_a_special_token(content):
    texts = trained("closing mark is special", assistant(content, reasoning_content="Rowan"))
    assert texts == ["<seed:think>Rowan</seed:think><seed:eos>"]


@pytest.mark.parametrize("name", ["dropped opening", "forced opening, key", "own tags"])
@pytest.mark.parametrize("reasoning", ["It costs $.", " \n It costs $.", "so $.\n", "é…", "(it's.)"])
def test_the_length_of_reasoning_covers_its_last_token(name, reasoning):
    tokenizer = tokenizer_of(name)
    (sample,) = render_samples([USER, assistant(reasoning_content=reasoning)], tokenizer)
    ids = sample.token_ids[sample.prompt_length :]
    covered = tokenizer.decode(ids[: sample.reasoning_length])
    assert reasoning.strip() in covered
    assert "Aspen" not in covered
    one_less = tokenizer.decode(ids[: sample.reasoning_length - 1])
    end = {"dropped opening": "", "forced opening, key": "</think>", "own tags": "</mm:think>"}[name]
    assert (reasoning.strip() + end).replace("\n", "") not in one_less.replace("\n", "")


@pytest.mark.parametrize("content", [None, "", "missing"])
def test_history_that_needs_a_content_beside_calls_gets_one(content):
    message = assistant(content, tool_calls=[CALL])
    if content == "missing":
        del message["content"]
    texts = trained("null-hostile history", message, RESULT, assistant(reasoning_content="Rowan"))
    assert texts == [f"\n</think>\n\n{CALL_TEXT}<|im_end|>\n", "Rowan\n</think>\n\nAspen<|im_end|>\n"]


def test_plain_strings_for_a_template_that_takes_parts_alone():
    tokenizer = tokenizer_of("users in parts")
    (sample,) = render_samples([USER, assistant()], tokenizer)
    assert prompt(sample, tokenizer) == "<|im_start|>user\nJuniper<|im_end|>\n<|im_start|>assistant\n"
    assert completion(sample, tokenizer) == "Aspen<|im_end|>\n"


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_answer_is_rendered_as_others_are(content):
    assert trained("no block without an answer", assistant(content)) == ["\n</think>\n\n<|im_end|>\n"]
    assert trained("no block without an answer", assistant(content), enable_thinking=False) == ["<|im_end|>\n"]
    thought = assistant(content, reasoning_content="Rowan")
    assert trained("no block without an answer", thought) == ["Rowan\n</think>\n\n<|im_end|>\n"]


@pytest.mark.parametrize("spelling", ["key", "inline"])
def test_reasoning_stands_before_the_block_of_the_answer(spelling):
    fields = {"reasoning_content": "Rowan"} if spelling == "key" else {"content": "<think>\nRowan\n</think>\n\nAspen"}
    texts = trained("answer in a block", assistant(**fields), USER, assistant("", tool_calls=[CALL], thinking="Hazel"))
    thought, calls = "<|START_THINKING|>{}<|END_THINKING|>", f"<|START_ACTION|>{CALL_TEXT}<|END_ACTION|>"
    assert texts == [
        f"{thought.format('Rowan')}<|START_RESPONSE|>Aspen<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        f"{thought.format('Hazel')}{calls}<|END_OF_TURN_TOKEN|>",
    ]


@pytest.mark.parametrize("arguments", [{"key": "Maple"}, '{"key": "Maple"}'])
@pytest.mark.parametrize("kept", [("id", "type"), ("id",), ()])
def test_flat_calls_are_wrapped(arguments, kept):
    flat = {**{key: CALL[key] for key in kept}, "name": "lookup", "arguments": arguments}
    texts = trained("strings only", assistant("", tool_calls=[flat]), RESULT, assistant(), tools=TOOLS)
    assert texts == [f"{CALL_TEXT}<|im_end|>\n", "Aspen<|im_end|>\n"]


NO_NAME = "{% for c in m.tool_calls %}<call>{{ c.id }}<arguments>{{ c.function.arguments | tojson }}{% endfor %}"


@pytest.mark.parametrize("call_id", ["call_0", None])
def test_a_template_that_writes_ids_in_the_place_of_names_is_told_from_one_without_calls(call_id):
    source = HARD_TEMPLATES["strings only"].source
    start = source.index("{% for c in m.tool_calls")
    source = source[:start] + NO_NAME + source[source.index("{% endfor %}", start) + len("{% endfor %}") :]
    tokenizer = tokenizer_for(None, source, ("<|im_end|>",))
    call = {key: value for key, value in {**CALL, "id": call_id}.items() if value is not None}
    with pytest.raises(RenderingError, match=r"'functions\.lookup:0'"):
        render_samples([USER, assistant("", tool_calls=[call])], tokenizer)
    (sample,) = render_samples([USER, assistant("", tool_calls=[{**CALL, "id": "functions.lookup:0"}])], tokenizer)
    assert "functions.lookup:0" in completion(sample, tokenizer)


@pytest.mark.parametrize("arguments", ['{"key": "Maple"', "Maple", '["Maple"]', "null", "{'key': 'Maple'}"])
def test_arguments_that_are_broken_json_are_refused_where_they_are_trained(arguments):
    broken = {"id": "call00000", "type": "function", "function": {"name": "lookup", "arguments": arguments}}
    messages = [USER, assistant("", tool_calls=[broken]), RESULT, assistant()]
    for name in ("strings only", "no stop"):
        with pytest.raises(RenderingError, match=r"Message 1 .*'arguments'"):
            render_samples(messages, tokenizer_of(name), tools=TOOLS)


@pytest.mark.parametrize("arguments", ["", " ", "{}"])
def test_a_call_without_arguments_is_no_broken_one(arguments):
    call = {**CALL, "function": {"name": "lookup", "arguments": arguments}}
    assert trained("strings only", assistant("", tool_calls=[call])) == ["<tool_call>lookup{}</tool_call><|im_end|>\n"]


@pytest.mark.parametrize("name", ["strings only", "no stop", "marks in parts", "stripped everywhere"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "part"])
def test_reasoning_given_twice_is_refused(name, key):
    content = "<think>x</think>Hello"
    if key == "part":
        message = assistant([{"type": "thinking", "thinking": "y"}, {"type": "text", "text": content}])
    else:
        message = assistant(content, **{key: "y"})
    with pytest.raises(RenderingError, match=r"Message 1 .*twice"):
        render_samples([USER, message], tokenizer_of(name))


def test_parts_beside_calls_are_joined_where_a_template_would_print_them_as_a_list():
    joined = "{% if m.content is string or m.tool_calls %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    source = HARD_TEMPLATES["strings only"].source.replace("{{ m.content | string }}", joined)
    tokenizer = tokenizer_for(None, source, ("<|im_end|>",))
    parts = assistant([{"type": "text", "text": "Hazel"}], tool_calls=[CALL])
    (sample,) = render_samples([USER, parts], tokenizer)
    assert completion(sample, tokenizer) == f"Hazel{CALL_TEXT}<|im_end|>\n"


def test_an_empty_block_beside_reasoning_says_nothing():
    (text,) = trained("no stop", assistant("<think>\n\n</think>\n\nAspen", reasoning_content="Rowan"))
    assert text == "<think>Rowan</think>Aspen<|user|>"


def test_advice_names_no_tags_that_the_model_does_not_write():
    with pytest.raises(RenderingError) as caught:
        render_samples(CHAT, tokenizer_for("llama3", None, None))
    assert "<think>" not in str(caught.value)


def assert_tokens_of(source, messages, expected, **kwargs):
    tokenizer = tokenizer_for(None, source, ("<|im_end|>",))
    samples = render_samples(messages, tokenizer, tools=TOOLS)
    assert [completion(sample, tokenizer) for sample in samples] == expected
    for sample in samples:
        served = tokenizer.apply_chat_template(
            messages[: sample.message_index], tools=TOOLS, add_generation_prompt=True, tokenize=False, **kwargs
        )
        assert prompt(sample, tokenizer) == served


@pytest.mark.parametrize("content", ["", None, []])
def test_reasoning_without_an_answer_is_closed_once(content):
    texts = trained("reasoning in a message", assistant(content, reasoning_content="Rowan"))
    assert texts == ["/think\nRowan<|im_end|><|endofturn|>\n"]


_JSON_RESULTS = HARD_TEMPLATES["strings only"].source.replace(
    "{{ m.content | string }}<|im_end|>\n{% endif %}", "{{ {'result': m.content} | tojson }}<|im_end|>\n{% endif %}"
)


@pytest.mark.parametrize(
    "result",
    [
        ["Linden", "Hazel"],
        ["Linden", {"type": "text", "text": "Hazel"}],
        [{"type": "text", "text": "Linden"}],
        [7, "x"],
    ],
)
def test_results_are_printed_as_json_as_they_are_served(result):
    messages = [USER, assistant("", tool_calls=[CALL]), {**RESULT, "content": result}, assistant()]
    if any(not isinstance(part, str | dict) for part in result):
        messages[2]["content"] = {"values": result}
    assert_tokens_of(_JSON_RESULTS, messages, [f"{CALL_TEXT}<|im_end|>\n", "Aspen<|im_end|>\n"])


@pytest.mark.parametrize("contents", [(["Juniper"], "Aspen"), ("Juniper", ["Aspen", {"type": "text", "text": "!"}])])
def test_what_a_template_refuses_in_a_list_is_not_trained(contents):
    tokenizer = tokenizer_of("users in parts")
    messages = [{"role": "user", "content": contents[0]}, assistant(contents[1])]
    if isinstance(contents[0], list):
        with pytest.raises(RenderingError, match=r"Message 1 .*refuses"):
            render_samples(messages, tokenizer)
    else:
        (sample,) = render_samples(messages, tokenizer)
        assert completion(sample, tokenizer) == "Aspen!<|im_end|>\n"


_LOOKS_FOR_THE_KEY = HARD_TEMPLATES["strings only"].source.replace(
    "{% for c in m.tool_calls %}", "{% if 'tool_calls' in m %}<calls>{% endif %}{% for c in m.tool_calls %}"
)


@pytest.mark.parametrize("calls", [[], None])
def test_an_empty_list_of_calls_is_none(calls):
    tokenizer = tokenizer_for(None, _LOOKS_FOR_THE_KEY, ("<|im_end|>",))
    samples = render_samples([USER, assistant(tool_calls=calls), USER, assistant("Birch")], tokenizer)
    assert [completion(sample, tokenizer) for sample in samples] == ["Aspen<|im_end|>\n", "Birch<|im_end|>\n"]
    assert "<calls>" not in prompt(samples[1], tokenizer)


@pytest.mark.parametrize("function", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": {}}])
@pytest.mark.parametrize("flat", [False, True])
def test_a_call_without_arguments_has_an_empty_object_of_them(function, flat):
    function = {"name": "lookup", **function}
    call = {"id": "call00000", **function} if flat else {"id": "call00000", "function": function}
    texts = trained("strings only", assistant("", tool_calls=[call]), RESULT, assistant())
    assert texts[0] == "<tool_call>lookup{}</tool_call><|im_end|>\n"


def test_random_ids_of_calls_are_not_trained():
    shown = HARD_TEMPLATES["strings only"].source.replace(
        "<tool_call>", "<tool_call>{{ c.id or range(9999) | random }} "
    )
    tokenizer = tokenizer_for(None, shown, ("<|im_end|>",))
    turns = [assistant("", tool_calls=[CALL]), RESULT, assistant()]
    samples = render_samples([USER, *turns], tokenizer)
    assert completion(samples[0], tokenizer).startswith("<tool_call>call00000 lookup")
    turns[0] = assistant("", tool_calls=[{key: value for key, value in CALL.items() if key != "id"}])
    with pytest.raises(RenderingError, match=r"Message 1 .*'id'"):
        render_samples([USER, *turns], tokenizer)


@pytest.mark.parametrize("spelling", ["#{{ loop.revindex }} {{ m.content }}", "{{ m.content }} ({{ loop.revindex }})"])
@pytest.mark.parametrize("text", ["Aspen", "Aspen 12"])
def test_a_number_counted_from_the_end_is_not_trained(spelling, text):
    source = HARD_TEMPLATES["strings only"].source.replace("{{ m.content | string }}" + "{% for", spelling + "{% for")
    tokenizer = tokenizer_for(None, source, ("<|im_end|>",))
    with pytest.raises(RenderingError, match=r"Message 1 .*number"):
        render_samples([USER, assistant(text), USER, assistant("Birch")], tokenizer)


def test_numbers_counted_from_the_end_may_stand_in_prompts():
    source = "{% for m in messages %}[{{ loop.revindex }}]<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    source += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    messages = [USER, assistant("Aspen 3"), USER, assistant("Birch")]
    assert_tokens_of(source, messages, ["Aspen 3<|im_end|>\n", "Birch<|im_end|>\n"])


@pytest.mark.parametrize("turns", [1, 2])
def test_a_template_that_is_no_jinja_is_named(turns):
    tokenizer = tokenizer_for(None, "{% for m in messages %}\n{{ m.content }}{% endfo %}", ("<|im_end|>",))
    with pytest.raises(RenderingError, match="line 2"):
        render_samples([USER, assistant()] * turns, tokenizer)
