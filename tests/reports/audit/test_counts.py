"""Token counts over turns and samples."""

from transformers import Qwen3Config

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.audit import audit


def test_token_counts_and_turns_over_max_length():
    tokenizer, rows = make_tokenizer(), [chat(2), chat(3, 1)]
    samples = [render_example({"messages": row}, tokenizer) for row in rows]
    limit = sorted(len(sample) for turns in samples for sample in turns)[2]
    report = audit(rows, tokenizer, max_length=limit)
    assert report.all_turns.prompt_tokens == sum(s.prompt_length for turns in samples for s in turns)
    assert report.all_turns.reasoning_tokens == sum(s.reasoning_length for turns in samples for s in turns)
    assert report.all_turns.over_max_length == 2
    assert [stats.turns for stats in report.by_turn] == [2, 2, 1]
    assert report.by_turn[1].prompt_tokens == sum(turns[1].prompt_length for turns in samples)
    assert report.sample_lengths.largest == max(len(sample) for turns in samples for sample in turns)
    assert sum(report.sample_lengths.counts) == 5


def test_the_models_length_is_the_default_limit():
    assert audit([chat(2)], make_tokenizer(), Qwen3Config(max_position_embeddings=9)).all_turns.over_max_length == 2
