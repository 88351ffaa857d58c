"""A tiny model and a file of four conversations, on disk, and files that nothing reads."""

import json

import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS, chat, tool_chat
from support.trainers import float32_model


# By name; all are encoded in Latin-1.
_EXAMPLE = '{"messages": [{"role": "user", "content": "Où ?"}, {"role": "assistant", "content": "Là."}]}'

UNREADABLE = {
    "latin.jsonl": f"{_EXAMPLE}\n",
    "latin.json": f"[{_EXAMPLE}]",
    "latin.csv": "messages\nOù ?\n",
    "uneven.csv": "messages\na\nb,c,d\n",
}


def examples():
    """Two chats, and one with tool calls whose arguments are an object, then a string."""
    called = tool_chat()
    as_text = json.loads(json.dumps(called))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1, "b": 2}'
    return [
        {"messages": chat(3)},
        {"messages": chat(2, 1)},
        {"messages": called, "tools": TOOLS},
        {"messages": as_text, "tools": TOOLS},
    ]


def write_model(folder, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.save_pretrained(folder)
    float32_model(tokenizer).save_pretrained(folder)
    return str(folder)


def write_examples(path):
    path.write_text("\n".join(json.dumps(example) for example in examples()) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data") / "rows.jsonl")
