"""Inspection: who is trained, with what weight, by whom shared, and the page that shows it."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS, chat, tool_chat
from trl_singlepass.cli.arguments import describe_error
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.inspection import Inspection, render_inspection
from trl_singlepass.reports.pages import frame, inspection_page


def inspected(messages, template="qwen3", **row):
    tokenizer = make_tokenizer(template)
    return Inspection.from_samples(render_example({"messages": messages, **row}, tokenizer), tokenizer)


def printed(inspection):
    console = Console(file=io.StringIO(), width=100)
    console.print(render_inspection(inspection))
    return console.file.getvalue()


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def text(inspection, role):
    return "".join(t for t, r in zip(inspection.texts, inspection.roles, strict=True) if r == role)


@pytest.mark.parametrize("template", ["qwen3", "glm4moe", "gptoss", "nemotron_3_nano", "llama3"])
def test_prompts_are_coloured_by_role(template):
    messages = (
        chat(3)
        if template != "llama3"
        else [{k: v for k, v in m.items() if k != "reasoning_content"} for m in chat(3)]
    )
    inspection = inspected(messages, template)
    assert "Be brief." in text(inspection, "system")
    assert all(f"What is {i} + 1?" in text(inspection, "user") for i in range(3))
    assert all(f"It is {i + 1}." in text(inspection, "answer") for i in range(3))
    assert "We add 1" not in text(inspection, "history") + text(inspection, "user")


def test_reasoning_answers_and_tool_results_are_told_apart():
    inspection = inspected(tool_chat(), tools=TOOLS)
    assert all(word in text(inspection, "reasoning") for word in ("The tool adds.", "It says 3.", "Polite."))
    assert "<tool_response>" in text(inspection, "tool")
    assert "<tools>" in text(inspection, "system")
    assert "<tool_call>" in text(inspection, "answer")


def test_weights_are_those_of_the_samples():
    inspection = inspected(chat(3))
    trained = np.zeros(len(inspection.tree))
    for sample, path in zip(inspection.samples, inspection.paths, strict=True):
        np.testing.assert_array_equal(inspection.tree.input_ids[path], sample.token_ids)
        trained[path] += sample.loss_weights
    np.testing.assert_array_equal(inspection.tree.token_weights, trained)


def test_targets_are_the_tokens_that_follow_on_a_trained_path():
    inspection = inspected(chat(2))
    for sample, path in zip(inspection.samples, inspection.paths, strict=True):
        for place in np.flatnonzero(sample.loss_weights):
            assert inspection.targets[path[place - 1]] == inspection.texts[path[place]]
    assert sum(target is not None for target in inspection.targets) == sum(
        int(s.loss_weights.sum()) for s in inspection.samples
    )


def test_terminal_names_what_is_shared_and_trained():
    inspection = inspected(chat(3))
    shown = printed(inspection)
    assert "shared by turns 1-3: context" in shown
    assert all(f"turn {turn} ends here" in shown for turn in (1, 2, 3))
    assert f"{int(inspection.samples[0].loss_weights.sum())} trained, weight 1" in shown
    assert f"sharing factor {inspection.tree.sharing_factor:.2f}" in shown


def test_get_text_the_conversation_is_shown_literally():
    messages = [
        {"role": "user", "content": "[red]</script><b>[/nope]"},
        {"role": "assistant", "content": "<i>no</i> [x]"},
    ]
    inspection = inspected(messages)
    shown = "".join(printed(inspection).replace("│", "").split())
    assert "[red]</script><b>[/nope]" in shown
    page = inspection_page(inspection, "a <b>title</b>")
    assert "<b>" not in page
    assert "<i>no" not in page
    assert page.count("</script>") == 2
    assert "".join(data_of(page)["text"]).count("[red]</script><b>[/nope]") == 1


def test_no_token_can_end_the_script_that_holds_it():
    data = {"text": ["</script><script>alert(1)</script>", "<!--"]}
    page = frame("page", "", script="inspection.js", data=data)
    assert data_of(page) == data
    assert page.count("<script") == 2
    assert "<!--" not in page


def test_page_holds_every_turn_and_needs_nothing_else():
    inspection = inspected(chat(4))
    page = inspection_page(inspection, "page")
    data = data_of(page)
    for turn, sample in zip(data["turns"], inspection.samples, strict=True):
        positions = [i for start, end in turn["path"] for i in range(start, end)]
        assert [int(inspection.tree.input_ids[i]) for i in positions] == sample.token_ids.tolist()
        assert (turn["prompt"], turn["reasoning"]) == (sample.prompt_length, sample.reasoning_length)
    assert data["end"] == inspection.tree.subtree_end.tolist()
    assert data["weight"] == inspection.tree.token_weights.tolist()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("control", ["\x1b[31m", "\x9b2J", "\x07", "\x1b]0;title\x07"])
def test_controls_of_the_data_do_not_reach_the_terminal(control):
    inspection = inspected(
        [{"role": "user", "content": f"a{control}b"}, {"role": "assistant", "content": f"c{control}"}]
    )
    shown = printed(inspection) + describe_error(ValueError(f"Message 0 has {control}"), "audit")
    assert not set(shown) & {"\x1b", "\x9b", "\x07"}
    assert control.strip("\x1b\x9b\x07") in printed(inspection)
