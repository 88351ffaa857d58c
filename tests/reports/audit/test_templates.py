"""What chat templates do with reasoning."""

import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, plain_chat
from trl_singlepass.reports.audit import audit


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
