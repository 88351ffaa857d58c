"""Text that renderings share is tokenised once, to the tokens of the whole text."""

import time
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from support.chat_tokenizers import make_tokenizer
from support.conversations import AGENT
from trl_singlepass.rendering.samples import _count_tokens_of
from trl_singlepass.rendering.tokenization import HardBorders, hard_borders, map_while_tokenizing, tokenize


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe", "gemma4_v5"])
def test_shared_text_is_tokenised_once_to_the_same_tokens(name):
    tokenizer = make_tokenizer(name)
    borders = hard_borders(tokenizer, tokenizer.chat_template)
    assert borders.tokens
    texts = ["", "<", "plain  text\n", "<think>", " <think> <|im_end|>\n\n<|im_end|", "<|channel|><|channel>é<|end|>"]
    texts += [tokenizer.apply_chat_template(AGENT[:k], tokenize=False) for k in range(1, 9)]
    for ids, text in zip(tokenize(borders, texts), texts, strict=True):
        assert ids.tail(0).tolist() == tokenizer(text, add_special_tokens=False).input_ids


def test_tokenizers_with_a_prefix_space_are_not_cut():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁x": 1, "x": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens(["<a>"], special_tokens=True)
    assert hard_borders(tokenizer, "<a>").tokens == []


def test_borders_are_tokens_that_nothing_else_can_reach_over():
    tokenizer = make_tokenizer()
    added = ["<a>", "<b>", "x<b", "<c>", "<c><c>"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.add_tokens([AddedToken("<d>", normalized=True), AddedToken("<e>", normalized=False, lstrip=True)])
    assert hard_borders(tokenizer, "<a><b><c><d><e>").tokens == ["<a>"]


def tokenizer_with_merges(*merges):
    """Return a tokenizer of single characters that joins these pairs, the first before the second."""
    characters = sorted(set("".join(map("".join, merges)) + "so $.\nYes<think>/é"))
    vocabulary = dict.fromkeys([*characters, *map("".join, merges)])
    bpe = models.BPE({token: id_ for id_, token in enumerate(vocabulary)}, list(merges))
    fast = Tokenizer(bpe)
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=fast)


@pytest.mark.parametrize(
    ("merges", "count"),
    [
        ([(".", "\n"), ("$", ".")], 2),  # "$." alone is one token, "$.\n\nYes" begins with "$" and ".\n"
        ([("$", "."), (".", "\n")], 1),
        ([("\n", "\n"), (".", "\n\n"), ("$", ".")], 2),
        ([("$", "."), ("$.", "\n")], 1),
    ],
)
def test_tokens_of_reasoning_are_those_that_begin_within_it(merges, count):
    tokenizer = tokenizer_with_merges(*merges)
    text, whole = "$.", "$.\n\nYes"
    alone, ids = (np.array(tokenizer(part)["input_ids"]) for part in (text, whole))
    offsets = tokenizer(whole, return_offsets_mapping=True)["offset_mapping"]
    assert sum(start < len(text) for start, _ in offsets) == count
    assert _count_tokens_of(text, alone, ids, tokenizer) == count


def test_a_long_beginning_is_tokenised_once_for_all_conversations(monkeypatch):
    tokenizer = make_tokenizer()
    borders = HardBorders(tokenizer, ["<|im_start|>", "<|im_end|>"])
    asked, encode = [], borders.encode
    monkeypatch.setattr(borders, "encode", lambda pieces: asked.extend(pieces) or encode(pieces))
    system = "Be brief. " * 200
    for number in range(100):
        texts = [f"<|im_start|>{system}<|im_end|>{number}", f"<|im_start|>{system}<|im_end|>{number}{system}"]
        for ids, text in zip(tokenize(borders, texts), texts, strict=True):
            assert ids.tail(0).tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert asked.count(system) == 1
    for number in range(100):
        tokenize(borders, [f"{system}{number}<|im_end|>"])
    assert len(borders.beginnings) == 64, "the last ones are kept"


def test_a_tokenizer_that_pads_or_has_a_way_of_its_own_is_asked_itself():
    tokenizer = make_tokenizer()
    assert hard_borders(tokenizer, tokenizer.chat_template).backend is tokenizer.backend_tokenizer
    borders = HardBorders(tokenizer, ["<|im_end|>"])
    tokenizer.backend_tokenizer.enable_padding(length=64)
    (ids,) = tokenize(borders, ["a<|im_end|>b"])
    assert ids.tail(0).tolist() == tokenizer("a<|im_end|>b", add_special_tokens=False).input_ids

    class Own(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    tokenizer.__class__ = Own
    assert HardBorders(tokenizer, ["<|im_end|>"]).backend is None


def test_an_example_is_prepared_while_another_is_tokenised_but_none_while_another_runs_python():
    tokenizer = make_tokenizer()
    borders = HardBorders(tokenizer, ["<|im_end|>"])
    two_in_the_tokenizer, running = Barrier(2, timeout=20), []

    def encode(pieces, add_special_tokens):
        assert not running
        two_in_the_tokenizer.wait()
        return [SimpleNamespace(ids=[len(piece)]) for piece in pieces]

    borders.backend = SimpleNamespace(truncation=None, padding=None, encode_special_tokens=False)
    borders.backend.encode_batch_fast = encode

    def prepare(number, word):
        running.append(number)
        time.sleep(0.001)  # other threads may run
        assert running == [number]
        running.clear()
        ids = tokenize(borders, [number * word])[0]
        time.sleep(0.001)
        assert not running
        return ids.tail(0).tolist()

    assert map_while_tokenizing(prepare, range(1, 7), "abcdef") == [[1], [2], [3], [4], [5], [6]]


def test_the_first_error_in_order_is_raised_and_nothing_begins_after_it():
    two_in_the_tokenizer, begun = Barrier(2, timeout=20), []
    borders = HardBorders(make_tokenizer(), ["<|im_end|>"])
    borders.backend = SimpleNamespace(truncation=None, padding=None, encode_special_tokens=False)

    def encode(pieces, add_special_tokens):
        two_in_the_tokenizer.wait()
        if pieces == ["first"]:
            time.sleep(0.2)  # the second one fails before
        raise ValueError(pieces[0])

    borders.backend.encode_batch_fast = encode

    def prepare(text):
        begun.append(text)
        return tokenize(borders, [text]) if text in ("first", "second") else time.sleep(0.01)

    texts = ["first", "second", *map(str, range(100))]
    with pytest.raises(ValueError, match="first"):
        map_while_tokenizing(prepare, texts)
    assert begun == texts[: len(begun)]
    assert len(begun) < len(texts)
