"""
What a message says decides what is trained, not how it is spelt.

Reasoning may stand under three keys, between tags or in a content part; content may be empty, null or missing; the
arguments of a call may be an object or JSON; a call may have its function under a key or not. The tokens must be the
same, unless `apply_chat_template` itself gives other prompts.
"""

import random
import re
from itertools import zip_longest

import pytest

from support.second_opinion import SPELLINGS, TEMPLATES, TOOLS, Author, spelt, tokenizer_for
from trl_singlepass.rendering.conversation import Conversation, RenderingError
from trl_singlepass.rendering.samples import render_conversation


def rendered(messages, tokenizer, tools):
    try:
        return render_conversation(Conversation(messages, tools), tokenizer)
    except RenderingError as error:
        return error


def served(messages, tokenizer, tools):
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise anything
        return type(error)


def differences(messages, names, tokenizer, tools):
    """How the tokens of a conversation differ between two spellings, where its template does not want them to."""
    other = spelt(messages, *names)
    samples, others = rendered(messages, tokenizer, tools), rendered(other, tokenizer, tools)
    if isinstance(samples, RenderingError):
        # Content is printed as it stands by templates that know no reasoning: then it is no other spelling.
        code = re.sub(r"\{#.*?#\}", "", tokenizer.chat_template, flags=re.S)
        is_content = "inline" in names and "think" not in code.lower()
        # A template that takes no empty content takes a part that holds reasoning.
        is_own = any(
            isinstance(served(other[:k], tokenizer, tools), str)
            and not isinstance(served(messages[:k], tokenizer, tools), str)
            for k in range(1, len(messages) + 1)
        )
        is_refused = is_content or is_own or isinstance(others, RenderingError)
        return [] if is_refused else [f"refused, but not with {names}"]
    if isinstance(others, RenderingError):
        return [f"{names}: {others}"]
    found = []
    for sample, spelt_sample in zip_longest(samples, others):
        k, ids = sample.message_index, [one.token_ids.tolist() for one in (sample, spelt_sample)]
        prompts = [tokenizer.decode(one.token_ids[: one.prompt_length]) for one in (sample, spelt_sample)]
        completions = [one_ids[one.prompt_length :] for one, one_ids in zip((sample, spelt_sample), ids, strict=True)]
        if completions[0] != completions[1]:
            found.append(f"{names}, message {k}: {[*map(tokenizer.decode, completions)]}")
        if sample.reasoning_length != spelt_sample.reasoning_length:
            found.append(f"{names}, message {k}: {sample.reasoning_length} and {spelt_sample.reasoning_length} tokens")
        if prompts[0] != prompts[1]:
            # Templates themselves refuse some spellings of calls.
            as_spelt = spelt(messages, *(name for name in names if name not in ("json", "flat", "missing", "null")))
            texts = [served(m[:k], tokenizer, tools) for m in (messages, as_spelt)]
            if isinstance(texts[1], str) and texts[0] != texts[1]:
                continue
            found.append(f"{names}, message {k}: {[prompt[-120:] for prompt in prompts]}")
    return found


@pytest.fixture(autouse=True)
def one_time(monkeypatch):
    """Some templates print the time, which must not tick between two renderings."""
    monkeypatch.setattr("trl_singlepass.rendering.template.freeze", lambda now: {"%": ""})


@pytest.mark.parametrize(("name", "source", "stops", "parts", "tokens"), TEMPLATES)
def test_every_spelling_gives_the_same_tokens(name, source, stops, parts, tokens):
    tokenizer = tokenizer_for(name, source, stops, tokens)
    for seed in range(4):
        tools = TOOLS if seed % 2 else None
        messages = Author(seed).conversation(tools is not None)
        for spelling in SPELLINGS:
            if spelt(messages, spelling) != messages:
                assert not differences(messages, [spelling], tokenizer, tools)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source", "stops", "parts", "tokens"), TEMPLATES)
def test_every_mixture_of_spellings_gives_the_same_tokens(name, source, stops, parts, tokens):
    tokenizer = tokenizer_for(name, source, stops, tokens)
    for seed in range(1000, 1120):  # more than 10,000 conversations over all templates
        tools = TOOLS if seed % 2 else None
        names = random.Random(seed).sample(sorted(SPELLINGS), 3)
        messages = Author(seed).conversation(tools is not None)
        assert not differences(messages, names, tokenizer, tools)
