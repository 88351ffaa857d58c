"""`verify`, `inspect` and `audit` on preference pairs."""

import json
from pathlib import Path

import pytest

from benchmarks.preference import speed_table, stock_table
from support.pairs import pair, pair_with_shared_turns
from support.small_repository import DEMO_MODEL, as_a_reader, make_small_repository
from support.tiny_models import tiny_model
from trl_singlepass import audit, cli, verify
from trl_singlepass.data.pairs import example_to_pair
from trl_singlepass.data.settings import PairSettings
from trl_singlepass.trees.prefix_tree import PrefixTree


EXAMPLE = pair_with_shared_turns(1, 2)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def rendered(tokenizer):
    return example_to_pair(EXAMPLE, 0, tokenizer, PairSettings())


def test_verify_checks_the_turns_of_both_trajectories(tokenizer, rendered):
    report = verify(tiny_model("llama", len(tokenizer), attn_implementation="sdpa"), tokenizer, [EXAMPLE])
    assert report.ok, report
    (row,) = report.rows
    assert [turn.message_index for turn in row.turns] == [2, 4, 2, 4]
    assert row.npass_tokens == sum(map(len, rendered.samples))
    assert row.single_pass_tokens == len(PrefixTree.from_samples(rendered.samples))
    assert row.turns[0].single_pass_loss == pytest.approx(row.turns[2].single_pass_loss, abs=1e-15)  # shared
    assert row.turns[1].single_pass_loss != pytest.approx(row.turns[3].single_pass_loss, abs=1e-6)


def test_audit_counts_turns_of_both_and_the_tree_of_the_pair(tokenizer, rendered):
    report = audit([EXAMPLE, pair(1, seed=3), {**EXAMPLE, "rejected": []}], tokenizer)
    assert report.num_trainable == 2
    assert len(report.errors) == 1
    assert report.all_turns.trainable == 6
    assert report.tree_lengths.largest == len(PrefixTree.from_samples(rendered.samples))
    assert "preference pairs" in str(report)


def test_the_commands_take_pairs(tmp_path, capsys):
    folder = make_small_repository(tmp_path)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (EXAMPLE, pair(1))))
    arguments = [str(DEMO_MODEL), str(path)]
    with as_a_reader(folder):
        assert cli.main(["inspect", *arguments, "--html", "page.html"]) == 0
        assert cli.main(["audit", *arguments]) == 0
        assert cli.main(["verify", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2 chosen and 2 rejected turns" in printed
    assert "[chosen]" in printed
    assert "[rejected]" in printed


def test_the_page_says_what_the_committed_results_say():
    page = (ROOT / "docs" / "preference.md").read_text("utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "preference.json").read_text())
    assert "\n".join(speed_table(result["speed"]["rows"])) in page
    if "stock" in result:
        assert "\n".join(stock_table(result["stock"]["rows"])) in page
