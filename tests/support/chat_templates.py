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
    tokens: tuple[str, ...] = ()
    """Special tokens of the model that others do not have."""


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
    # Ministral 3: reasoning in a content part, between marks that end in no `>`; plain text for the content else.
    "marks in parts": HardTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if not m.content and not m.tool_calls %}"
        "{{ raise_exception('empty') }}{% endif %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'thinking' %}[THINK]{{ p.thinking }}[/THINK]{% else %}{{ p.text }}"
        "{% endif %}{% endfor %}{% endif %}" + _CALLS + "</s>{% else %}[INST]{{ m.content }}[/INST]{% endif %}"
        "{% endfor %}",
        stops=("</s>",),
        tokens=("[THINK]", "[/THINK]", "[INST]", "[/INST]"),
    ),
    # The same marks in a template that takes strings alone; a part of reasoning would be printed as Python's list.
    "marks in strings": HardTemplate(
        "{# [THINK] #}{{ '' if true else '[THINK]' }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ m.content }}" + _CALLS + "</s>{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}",
        stops=("</s>",),
        tokens=("[THINK]", "[/THINK]", "[INST]", "[/INST]"),
    ),
    # Seed-OSS: the mark that closes reasoning is a special token, and ends the message where the answer is empty.
    "closing mark is special": HardTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}<seed:bos>assistant"
        "{% if m.reasoning_content %}\n<seed:think>{{ m.reasoning_content }}</seed:think>{% endif %}"
        "{% if m.content %}\n{{ m.content }}{% if not m.tool_calls %}<seed:eos>{% endif %}{% endif %}"
        "{% if m.tool_calls %}\n" + _CALLS + "<seed:eos>{% endif %}{% else %}<seed:bos>{{ m.role }}\n"
        "{{ m.content }}<seed:eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<seed:bos>assistant\n{% endif %}",
        stops=("<seed:eos>",),
        tokens=("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"),
    ),
    # MiniMax-M1: a user whose content is a string is refused.
    "users in parts": HardTemplate(
        _chatml(
            "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}" + _CALLS,
            _HEADER + "{% endif %}",
            others="<|im_start|>{{ m.role }}\n{{ '' + m.content[0]['text'] }}<|im_end|>\n",
        ),
        parts=True,
    ),
    # QwQ: history needs a content where the last message needs none.
    "null-hostile history": HardTemplate(
        _chatml(
            "{% if not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% elif m.content %}"
            "{{ m.content }}{% endif %}" + _CALLS,
            _HEADER + "<think>\n{% endif %}",
        )
    ),
    # Command A: reasoning stands before the block of the answer, and templates write it beside calls alone.
    "answer in a block": HardTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "{% if m.tool_calls %}{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>"
        "{% endif %}<|START_ACTION|>" + _CALLS + "<|END_ACTION|>{% else %}<|START_RESPONSE|>{{ m.content }}"
        "<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>{% else %}<|START_OF_TURN_TOKEN|><|USER_TOKEN|>"
        "{{ m.content }}<|END_OF_TURN_TOKEN|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        stops=("<|END_OF_TURN_TOKEN|>",),
        tokens=("<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>"),
    ),
    # DeepSeek-V3.1: inline reasoning is read in plain answers, and printed as it stands beside tool calls.
    "inline in answers only": HardTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|></think>{% if m.tool_calls %}"
        "{{ m.content }}"
        + _CALLS
        + "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>{% else %}<|{{ m.role }}|>"
        "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>{% endif %}",
        tokens=("<|Assistant|>",),
    ),
    # EXAONE 4: an empty answer loses the block that other answers have.
    "no block without an answer": HardTemplate(
        _chatml(
            "{% if m.content %}<think>\n{{ m.reasoning_content if loop.last }}\n</think>\n\n{{ m.content }}"
            "{% elif m.tool_calls %}<think>\n{{ m.reasoning_content if loop.last }}\n</think>\n\n{% endif %}" + _CALLS,
            _HEADER + "<think>\n{% if not enable_thinking | default(true) %}\n</think>\n\n{% endif %}{% endif %}",
        )
    ),
    # HyperCLOVA X: reasoning is a message of its own, and two tokens end a turn.
    "reasoning in a message": HardTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content and loop.last %}<|im_start|>"
        "assistant/think\n{{ m.reasoning_content }}<|im_end|>\n{% endif %}{% if m.content %}<|im_start|>assistant\n"
        "{{ m.content }}<|im_end|>{{ '\n' if m.tool_calls else '<|endofturn|>\n' }}{% endif %}{% if m.tool_calls %}"
        "<|im_start|>assistant -> tool\n"
        + _CALLS
        + "<|im_end|><|stop|>\n{% endif %}{% else %}"
        + _OTHERS
        + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
        stops=("<|endofturn|>", "<|stop|>"),
        tokens=("<|stop|>",),
    ),
    # MiniMax-M3: tags of its own.
    "own tags": HardTemplate(
        _chatml(
            "{% if m.reasoning_content %}<mm:think>{{ m.reasoning_content }}{% endif %}</mm:think>"
            "{{ m.content }}" + _CALLS,
            _HEADER + "{% endif %}",
        )
    ),
}
