"""`chat`: every context is the one that training renders for that turn, and replies become messages again."""

import io
from types import SimpleNamespace

import pytest
import torch

from support.chat_tokenizers import make_tokenizer
from trl_singlepass.cli import commands
from trl_singlepass.rendering.conversation import Conversation
from trl_singlepass.rendering.history import render_with_history


SAID = ["What is 3 × 4?", "Plus 5?", "Times 2?"]
REPLIES = [("3 times 4 is 12.", "12"), ("12 + 5 = 17.", "17"), ("17 * 2 = 34.", "34")]


class ScriptedModel:
    """Writes the completions that it is given, and remembers the prompts."""

    device = "cpu"
    generation_config = SimpleNamespace(eos_token_id=None)

    def __init__(self, completions):
        self.completions, self.prompts, self.stops = iter(completions), [], []

    def generate(self, ids, *, streamer, eos_token_id, **settings):
        self.prompts.append(ids[0].tolist())
        self.stops.append(eos_token_id)
        completion = next(self.completions)
        streamer.put(ids)
        streamer.put(torch.tensor(completion))
        streamer.end()
        return torch.tensor([[*ids[0].tolist(), *completion]])

    def eval(self):
        return self


def conversation(system):
    messages = [{"role": "system", "content": system}] if system else []
    for said, (reasoning, content) in zip(SAID, REPLIES, strict=True):
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "reasoning_content": reasoning, "content": content})
    return Conversation(messages)


@pytest.mark.parametrize(
    ("template", "history"),
    [
        ("qwen3", "template"),
        ("qwen3", "strip"),
        ("qwen3_8", "template"),
        ("qwen3_8", "keep"),
        ("deepseek_r1_distill", "template"),
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_contexts_are_those_of_training(run, monkeypatch, tmp_path, template, history, system):
    tokenizer = make_tokenizer(template)
    samples = render_with_history(conversation(system), tokenizer, history)
    stop = next(i for i in samples[0].token_ids[::-1].tolist() if i in tokenizer.all_special_ids)
    completions = [sample.token_ids[sample.prompt_length :].tolist() for sample in samples]
    completions = [ids[: len(ids) - ids[::-1].index(stop)] for ids in completions]  # a model ends with its stop token
    model = ScriptedModel(completions)
    monkeypatch.setattr(commands, "load_tokenizer", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(commands, "load_model", lambda *args, **kwargs: model)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([SAID[0], "", *SAID[1:]]) + "\n"))
    code, out, _ = run("chat", tmp_path, "--history", history, *(["--system", system] if system else []))
    assert code == 0
    assert model.prompts == [sample.token_ids[: sample.prompt_length].tolist() for sample in samples]
    assert all(stop in stops for stops in model.stops)
    assert all(answer in out for _, answer in REPLIES)


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("", "12", None, "12"),
        ("", "<think>\nHm.\n</think>\n\n12", "Hm.", "12"),
        ("<think>\n", "Hm.\n</think>\n\n12", "Hm.", "12"),
        ("<think>\n\n</think>\n\n", "12", None, "12"),
        ("", "<think>\nHm, and then", "Hm, and then", ""),
        ("<think>\n", "Hm, and then", "Hm, and then", ""),
    ],
)
def test_replies_become_messages(prompt, text, reasoning, content):
    message = commands.to_message(text, prompt, "{% if '</think>' in content %}")
    assert message.get("reasoning_content") == reasoning
    assert message["content"] == content


@pytest.mark.slow
def test_a_saved_model_answers(run, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi.\nAgain.\n"))
    code, _, err = run("chat", model, "--max_new_tokens", "4")
    assert code == 0, err
