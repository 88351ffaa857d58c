"""The caching sandbox gives templates what transformers' sandbox gives them, and refuses what it refuses."""

import pytest
from jinja2 import Template
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from support.conversations import text_or_error
from trl_singlepass.rendering.sandbox import CachingSandbox, compiled_template


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
