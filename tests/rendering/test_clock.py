"""The clock that templates read stands still over a conversation, and formats as usual."""

import numpy as np

from support.chat_tokenizers import make_tokenizer
from support.conversations import CHAT, prompt, without_reasoning
from trl_singlepass.rendering.samples import render_samples


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
