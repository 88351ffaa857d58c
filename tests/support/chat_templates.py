"""Small chat templates, each with one quirk of a public template that makes rendering hard."""

from dataclasses import dataclass


_CALLS = (
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}"
)
_HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n"
_OTHERS = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"


def _chatml(assistant: str, prompt: str, others: str = _OTHERS, before: str = "") -> str:
    return (
        before
        + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        + assistant
        + "<|im_end|>\n"
        "{% else %}" + others + "{% endif %}{% endfor %}" + prompt
    )


@dataclass(frozen=True)
class HardTemplate:
    """A template, the form of messages that it takes, and the tokens at which its model stops."""

    source: str
    stops: tuple[str, ...] = ("<|im_end|>",)
    parts: bool = False
    """Whether content must be a list of parts."""


_STRIPPED = (
    "{% if not loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}"
)
_KEYED_LAST = (
    "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
)

HARD_TEMPLATES = {
    # QwQ, Nemotron Nano v2: the prompt opens the reasoning; only the last message keeps its reasoning.
    "forced opening": HardTemplate(_chatml(_STRIPPED + _CALLS, _HEADER + "<think>\n{% endif %}")),
    # MiniMax-M2: the same with a key, and without any block for a turn that has no reasoning.
    "forced opening, key": HardTemplate(_chatml(_KEYED_LAST + _CALLS, _HEADER + "<think>\n{% endif %}")),
    # Apriel 1.6: the prompt ends in words that are missing when the message itself is rendered.
    "dropped opening": HardTemplate(
        _chatml(
            "{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }}\n[BEGIN FINAL RESPONSE]\n{% endif %}"
            "{{ m.content }}" + _CALLS,
            _HEADER + "Here are my reasoning steps:\n{% endif %}",
        )
    ),
    # Laguna, Hunyuan 3, DeepSeek-V3.1: thinking is off by default, and the prompt says so.
    "closed prompt": HardTemplate(
        _chatml(
            _KEYED_LAST + _CALLS,
            _HEADER + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        )
    ),
    # MiniMax-M1, Idefics: content is a list of parts and nothing else.
    "parts only": HardTemplate(
        _chatml(
            "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
            "{% for p in m.content %}{{ p.text }}{% endfor %}" + _CALLS,
            _HEADER + "{% endif %}",
            others="<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n",
        ),
        parts=True,
    ),
    # DeepSeek-V4, EXAONE 4, Nemotron 3: content is a string; a list would be rendered as its Python repr.
    "strings only": HardTemplate(
        _chatml(
            "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
            "{{ m.content | string }}" + _CALLS,
            _HEADER + "{% endif %}",
            others="<|im_start|>{{ m.role }}\n{{ m.content | string }}<|im_end|>\n",
        )
    ),
    # Granite 3.3, SmolLM3, Phi-4: no key for reasoning; reasoning in the content is kept.
    "kept in the content": HardTemplate(
        _chatml("{{ m.content }}" + _CALLS, _HEADER + "{% endif %}", before="{#- -#}{{ '' if true else '<think>' }}")
    ),
    # Command R7B: the header of the next answer follows every conversation, requested or not.
    "header behind the stop": HardTemplate(
        _chatml("{{ m.content }}" + _CALLS, "<|im_start|>assistant\n", before="{{ '' if true else '<think>' }}")
    ),
    # Kimi-K2-Thinking: all messages up to the last one without calls lose their reasoning, including that one.
    "round dropped": HardTemplate(
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        + _chatml(
            "<think>{% if loop.index0 > ns.last %}{{ m.reasoning_content }}{% endif %}</think>{{ m.content }}"
            + _CALLS,
            _HEADER + "{% endif %}",
        )
    ),
    # gpt-oss as shipped by unsloth: the final answer removes the reasoning of its round, and has no stop token.
    "final without stop": HardTemplate(
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.reasoning_content and (loop.index0 > ns.last or loop.last) %}<|start|>assistant<|channel|>analysis"
        "<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}<|start|>"
        "assistant to="
        "{{ c.function.name }}<|channel|>commentary<|message|>{{ c.function.arguments | tojson }}<|call|>{% endfor %}"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% else %}<|start|>"
        "{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        stops=("<|return|>", "<|call|>"),
    ),
    # DeepSeek-R1: the last turn loses its reasoning too, and the prompt opens the reasoning.
    "stripped everywhere": HardTemplate(
        _chatml("{{ m.content.split('</think>')[-1] }}" + _CALLS, _HEADER + "<think>\n{% endif %}")
    ),
    # Seed-OSS: an empty answer has no stop token.
    "no stop after nothing": HardTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant"
        "{% if m.reasoning_content and loop.last %}\n<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{% if m.content %}\n{{ m.content }}<|im_end|>{% endif %}"
        "{% if m.tool_calls %}\n" + _CALLS + "<|im_end|>{% endif %}{% else %}" + _OTHERS + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # GLM: the stop token is the header of the message that follows.
    "no stop": HardTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% if m.reasoning_content and loop.last %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}" + _CALLS + "{% elif m.role == 'tool' %}"
        "<|observation|>{{ m.content }}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        stops=("<|user|>", "<|observation|>"),
    ),
    # Hunyuan: the time to the second, with a format string assembled from parts.
    "clock": HardTemplate(
        "{% set f = '%H:%M' ~ ':%' ~ 'S' %}{% set clock = strftime_now %}Now: {{ clock(f) }} {{ clock('%d %B %Y') }}\n"
        + _chatml(_KEYED_LAST + _CALLS, _HEADER + "{% endif %}")
    ),
}
