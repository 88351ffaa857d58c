"""What templates do to turns, as notes on real templates say: reasoning, calls, stop tokens, prefixes, branches."""

import pytest

from support.chat_tokenizers import make_tokenizer, template_text
from support.conversations import TOOLS, agentic_chat, chat, plain_chat, tool_chat
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.audit import audit
from trl_singlepass.reports.audit.turns import ReasoningPolicy


def test_stripped_history_hides_reasoning_and_makes_turns_branch():
    stats = audit([chat(4)], make_tokenizer()).all_turns
    assert (stats.reasoning_found, stats.reasoning_hidden, stats.branches) == (4, 3, {"reasoning removed": 3})


def test_empty_reasoning_blocks_make_every_turn_branch():
    report = audit([plain_chat(4)], make_tokenizer())
    assert report.all_turns.branches == {"empty reasoning block": 3}
    assert report.num_chains == 4


def test_other_stop_token_in_history():
    report = audit([plain_chat(4)], make_tokenizer("gptoss"))
    facts = report.templates[0][0]
    assert (facts.last_ending, facts.history_ending) == ("<|return|>", "<|end|>")
    assert report.all_turns.branches == {"other stop token": 3}
    assert any("<|return|>" in finding and "<|end|>" in finding for finding in report.findings)


def test_templates_that_take_content_in_parts_end_answers_like_others():
    facts = audit([plain_chat(2)], make_tokenizer("llava_next")).templates[0][0]
    assert (facts.kind, facts.last_ending, facts.history_ending) == (ReasoningPolicy.KEPT, "</s>", "</s>")


def test_missing_stop_token():
    report = audit([chat(3)], make_tokenizer("glm4moe"))
    assert report.all_turns.stop_added == 3
    assert any("<|user|> is added" in finding for finding in report.findings)
    assert audit([chat(3)], make_tokenizer()).all_turns.stop_added == 0


def test_reasoning_left_out_of_every_turn_is_put_back():
    report = audit([chat(3)], make_tokenizer("deepseek_r1_distill"))
    assert (report.all_turns.reasoning_found, report.all_turns.reasoning_restored) == (3, 3)
    assert report.num_trainable == 1


def test_dropped_tool_calls():
    report = audit([{"messages": tool_chat(), "tools": TOOLS}, chat(2)], make_tokenizer("deepseek_r1_distill"))
    assert (report.all_turns.with_calls, report.all_turns.calls_lost) == (1, 1)
    assert [(error.count, error.rows) for error in report.errors] == [(1, (0,))]
    assert "'add' is lost" in report.errors[0].reason
    assert report.num_trainable == 1
    assert audit([{"messages": tool_chat(), "tools": TOOLS}], make_tokenizer()).all_turns.calls_lost == 0


def test_reasoning_under_a_key_that_the_template_ignores():
    messages = [
        {("cot" if key == "reasoning_content" else key): value for key, value in message.items()}
        for message in chat(2)
    ]
    report = audit([messages, chat(2)], make_tokenizer())
    assert (report.all_turns.reasoning_under_other_key, report.all_turns.reasoning_found) == (2, 2)
    assert report.errors[0].count == 1
    assert "'cot'" in report.errors[0].reason


def test_reasoning_without_a_place_is_lost():
    stats = audit([chat(2)], make_tokenizer("llama3")).all_turns
    assert (stats.reasoning_lost, stats.reasoning_found) == (2, 0)


def test_prompts_that_are_not_token_prefixes():
    # The prompt ends in "\n", and in the rendering a token reaches over it.
    template = template_text("qwen3").replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    assert template != template_text("qwen3")
    tokenizer = make_tokenizer(chat_template=template)
    assert len(tokenizer("\n\n")["input_ids"]) < 2 * len(tokenizer("\n")["input_ids"])
    stats = audit([plain_chat(3)], tokenizer).all_turns
    assert (stats.not_token_prefix, stats.prompt_changed) == (3, 0)
    assert audit([chat(3)], tokenizer).all_turns.not_token_prefix == 0
    assert audit([plain_chat(3)], make_tokenizer()).all_turns.not_token_prefix == 0


def test_prompts_that_the_answer_changes():
    report = audit([agentic_chat()], make_tokenizer("gptoss"))
    assert report.all_turns.prompt_changed == 3  # at each final answer, the analysis before its tool calls disappears
    assert report.all_turns.kinds == {"as served": 6, "history rewritten": 3}
    assert "In 3 of 9 turns, the template rewrites earlier messages once the answer is there." in str(report)


def test_token_counts_and_turns_over_max_length():
    tokenizer, rows = make_tokenizer(), [chat(2), chat(3, 1)]
    samples = [render_example({"messages": row}, tokenizer) for row in rows]
    limit = sorted(len(sample) for turns in samples for sample in turns)[2]
    report = audit(rows, tokenizer, max_length=limit)
    assert report.all_turns.prompt_tokens == sum(s.prompt_length for turns in samples for s in turns)
    assert report.all_turns.reasoning_tokens == sum(s.reasoning_length for turns in samples for s in turns)
    assert report.all_turns.over_max_length == 2
    assert [stats.turns for stats in report.by_turn] == [2, 2, 1]
    assert report.by_turn[1].prompt_tokens == sum(turns[1].prompt_length for turns in samples)
    assert report.sample_lengths.largest == max(len(sample) for turns in samples for sample in turns)
    assert sum(report.sample_lengths.counts) == 5


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("qwen3", "stripped"),
        ("qwen3_5_think", "stripped"),
        ("gptoss", "stripped"),
        ("glm4moe", "stripped"),
        ("nemotron_3_nano", "stripped"),
        ("lfm2_2_5", "stripped"),
        ("qwen3_8", "kept"),
        ("llama3", "kept"),
        ("deepseek_r1_distill", "stripped from every turn"),
    ],
)
def test_template_class_is_measured(template, kind):
    report = audit([plain_chat(2)], make_tokenizer(template))
    assert [facts.kind for facts, _ in report.templates] == [kind]


def test_a_template_that_keeps_some_earlier_turns_is_mixed():
    forgets_the_first = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content and (loop.index0 > 1 or loop.last) %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}"
    )
    report = audit([chat(3)[1:]], make_tokenizer(), chat_template=forgets_the_first)
    assert report.templates[0][0].kind == "mixed"


def test_arguments_that_change_the_template_are_told_apart():
    rows = [{"messages": chat(2)}, {"messages": chat(2, 1), "chat_template_kwargs": {"preserve_thinking": True}}]
    report = audit(rows, make_tokenizer("qwen3_6"))
    assert sorted((facts.kind, count) for facts, count in report.templates) == [("kept", 1), ("stripped", 1)]
