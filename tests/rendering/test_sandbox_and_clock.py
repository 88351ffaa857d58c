"""The caching sandbox gives templates what transformers' sandbox gives them, and refuses what it refuses."""

import numpy as np
import pytest
from jinja2 import Template
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from support.chat_tokenizers import make_tokenizer
from support.conversations import CHAT, prompt, text_or_error, without_reasoning
from trl_singlepass.rendering.samples import render_samples
from trl_singlepass.rendering.template import CachingSandbox, compiled_template


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "reasoning_content": "Rowan.", "content": "Aspen."},
]


def test_the_sandbox_hands_out_what_transformers_sandbox_hands_out():
    source = "{{ messages }}"
    stock, remembering = _compile_jinja_template(source).environment, compiled_template(source).environment
    assert type(stock) is ImmutableSandboxedEnvironment
    assert type(remembering) is CachingSandbox
    namespace = stock.globals["namespace"](word="Oak", method="x".upper, format="x".format)
    loop = LoopContext([1, 2], Undefined)
    for value in ("text", {"role": "user", "keys": 1, "_hidden": 2}, [1], namespace, loop, print, 3, None, type(loop)):
        names = {*dir(value), "role", "keys", "_hidden", "word", "method", "format", "nothing"}
        for name in sorted(names):
            expected, found = (environment.getattr(value, name) for environment in (stock, remembering))
            assert type(found) is type(expected), (value, name)
            if isinstance(expected, Undefined):
                assert found._undefined_exception is expected._undefined_exception
                assert found._undefined_message == expected._undefined_message
            elif not callable(expected):
                assert found == expected or name in ("__dict__",)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{a.__class__}'.format_map({'a': messages}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}{{ messages[0].role }}",
        "{{ messages[0].pop('role') }}",
        "{{ messages[0]['__class__'] }}",
        "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{% set ns = namespace(a=1) %}{{ ns.__init__ }}{{ ns._Namespace__attrs }}",
        "{% set ns = namespace(f='{0.__class__}'.format) %}{{ ns.f(messages) }}",
        "{{ messages[0].content.strip.__self__.__class__ }}",
        "{{ messages[0].content.split('a', maxsplit=1) }}{{ messages[0].content.upper(1) }}",
        "{{ range(10**9) | list }}",
        "{{ messages[0].items() | list }}{{ messages[0].get('role') }}{{ messages[0].nothing.more }}",
    ],
)
def test_templates_get_as_far_as_in_transformers_sandbox(source):
    fast, stock = compiled_template(source), _compile_jinja_template(source)
    assert isinstance(fast, Template)
    texts = [text_or_error(template.render, messages=MESSAGES) for template in (stock, fast)]
    assert texts[0] == texts[1]


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
