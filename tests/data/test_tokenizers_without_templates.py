"""Tokenizers that render without a Jinja template, as that of mistral-common does: refused before a row is read."""

import copy
import re
import shutil
from pathlib import Path

import datasets
import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from support.pairs import pair
from support.preparation import prepare_pairs
from trl_singlepass import audit, render_samples, to_npass, verify
from trl_singlepass.data.bad_rows import BadRows
from trl_singlepass.data.preparation import prepare_dataset
from trl_singlepass.data.settings import PairSettings, RowSettings
from trl_singlepass.trees.errors import DataError


WAY_OUT = r"mistral_format=False.*'turns'"


def as_turns(messages, tokenizer):
    """Messages as a server logs them."""
    samples = render_samples(messages, tokenizer)
    parts = [(sample.token_ids.tolist(), sample.prompt_length) for sample in samples]
    return [{"prompt_ids": ids[:border], "completion_ids": ids[border:]} for ids, border in parts]


@pytest.fixture
def tokenizer():
    """A tokenizer of which everything works but templates."""
    tokenizer = copy.copy(make_tokenizer("qwen3"))

    class WithoutTemplates(type(tokenizer)):
        def get_chat_template(self, *_, **__):
            raise NotImplementedError

        def apply_chat_template(self, *_, **__):
            pytest.fail("a row was read")

    tokenizer.__class__ = WithoutTemplates
    return tokenizer


PREPARATIONS = {
    "conversations": lambda rows, tokenizer: prepare_dataset(rows, tokenizer, RowSettings(), bad_rows=BadRows.DROP),
    "pairs": lambda rows, tokenizer: prepare_pairs(rows, tokenizer, PairSettings(), bad_rows=BadRows.DROP),
    "samples": lambda rows, tokenizer: to_npass(rows, tokenizer),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("kind", PREPARATIONS)
def test_one_error_names_the_tokenizer_and_the_way_out(tokenizer, kind, streamed):
    rows = datasets.Dataset.from_list([pair(2)] if kind == "pairs" else [{"messages": chat(2)}] * 3)
    rows = rows.to_iterable_dataset() if streamed else rows
    with pytest.raises(ValueError, match=rf"WithoutTemplates.*{WAY_OUT}"):
        PREPARATIONS[kind](rows, tokenizer)


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
def test_turns_that_are_tokens_need_no_template(tokenizer, streamed):
    given = datasets.Dataset.from_list([{"turns": as_turns(chat(2), make_tokenizer("qwen3"))}])
    (row,) = prepare_dataset(given.to_iterable_dataset() if streamed else given, tokenizer, RowSettings())
    (expected,) = prepare_dataset(
        datasets.Dataset.from_list([{"messages": chat(2)}]), make_tokenizer("qwen3"), RowSettings()
    )
    assert list(row["input_ids"]) == expected["input_ids"]


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("kind", PREPARATIONS)
def test_a_tokenizer_without_a_template_is_no_fault_of_the_rows(kind, streamed):
    bare = copy.copy(make_tokenizer("qwen3"))
    bare.chat_template = None
    rows = datasets.Dataset.from_list([pair(2)] if kind == "pairs" else [{"messages": chat(2)}] * 3)
    rows = rows.to_iterable_dataset() if streamed else rows
    with pytest.raises(ValueError, match="chat_template_path") as caught:
        PREPARATIONS[kind](rows, bare)
    assert not isinstance(caught.value, DataError)
    assert not {"bad_rows", "turns"} & set(re.findall(r"\w+", str(caught.value)))


def test_the_tokenizer_of_mistral_common(tmp_path):
    common = pytest.importorskip("mistral_common")
    from transformers import MistralCommonBackend

    shutil.copy(Path(common.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    tokenizer = MistralCommonBackend.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=WAY_OUT):
        prepare_dataset(datasets.Dataset.from_list([{"messages": chat(2)}]), tokenizer, RowSettings())
    served = tokenizer.apply_chat_template(chat(1)[:1], tokenize=True)["input_ids"]
    turns = [{"prompt_ids": served, "completion_ids": [22177, tokenizer.eos_token_id]}]
    (row,) = prepare_dataset(datasets.Dataset.from_list([{"turns": turns}]), tokenizer, RowSettings())
    assert row["input_ids"][: len(served)] == served


@pytest.mark.parametrize(
    "reads", [audit, lambda rows, tokenizer: verify(None, tokenizer, rows)], ids=["audit", "verify"]
)
def test_reports_name_it_as_well(tokenizer, reads):
    with pytest.raises(ValueError, match=WAY_OUT):
        reads([{"messages": chat(2)}], tokenizer)
