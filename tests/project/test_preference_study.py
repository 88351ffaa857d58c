"""The study of pairs: they are ranked by right answers, arms differ in contexts, the page is its results."""

import shutil
from dataclasses import replace

import pytest

from studies.exactness.task import answers, conversations
from studies.preference import report
from studies.preference.__main__ import main
from studies.preference.arms import ARMS
from studies.preference.pairs import best_and_worst, is_well_formed, num_right
from studies.preference.runs import RESULTS, Sizes


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")
TINY = replace(
    Sizes(), sft_conversations=6, sft_steps=2, prompts=4, samples=2, steps=1, pairs_per_step=2, test_conversations=2,
    prompts_per_batch=8, max_new_tokens=4,
)  # fmt: skip


def answered(row, texts, reasoning="1+1=02"):
    messages = [dict(message) for message in row["messages"]]
    for message, text in zip(messages[1::2], texts, strict=True):
        message.update(content=text, reasoning_content=reasoning)
    return {"messages": messages}


def test_the_sample_with_most_right_answers_is_chosen():
    row = conversations(1, 1, range(3, 4))[0]
    right = answers(row)
    wrong = [str((int(text) + 1) % 10) for text in right]
    samples = [answered(row, [right[0], *wrong[1:]]), answered(row, right), answered(row, wrong)]
    assert [num_right(each, row) for each in samples] == [1, 3, 0]
    pair = best_and_worst(samples, row)
    assert pair["prompt"] == row["messages"][:1]
    assert pair["prompt"] + pair["chosen"] == samples[1]["messages"]
    assert pair["prompt"] + pair["rejected"] == samples[2]["messages"]
    assert best_and_worst([samples[0], samples[0]], row) is None
    malformed = answered(row, wrong, reasoning=None)
    assert not is_well_formed(malformed)
    assert best_and_worst([samples[1], malformed], row) is None


@pytest.mark.slow
def test_a_seed_works_end_to_end_and_is_not_repeated(tmp_path, monkeypatch):
    made_up = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [*row["messages"][1:-1], last]}
        for row, last in zip(
            conversations(3, 4), [{"role": "assistant", "reasoning_content": "1", "content": "1"}] * 4, strict=True
        )
    ]
    monkeypatch.setattr("studies.preference.runs.sample_pairs", lambda *args: made_up)
    main(["--seeds", "0", "--output", str(tmp_path)], TINY)
    (record,) = report.load(tmp_path)
    assert [run["arm"] for run in record["runs"]] == [arm for arm in ARMS for _ in TINY.learning_rates]
    assert all(len(run["losses"]) == 1 for run in record["runs"])
    written = (tmp_path / "seed-0.json").stat().st_mtime_ns
    main(["--seeds", "0", "--output", str(tmp_path)], TINY)
    assert (tmp_path / "seed-0.json").stat().st_mtime_ns == written


def test_differences_are_within_a_seed(tmp_path):
    def run(arm, accuracy):
        return {"arm": arm, "learning_rate": 1.0, "accuracy": {"given": [accuracy, 0.5], "own": [0.0, 0.0]}}

    records = [
        {
            "before": {"given": [0.1], "own": [0.1]},
            "sizes": {"learning_rates": [1.0]},
            "runs": [run("single_pass", 0.5 + seed / 10), run("stock", 0.3 + seed / 10), run("stock_keeps", 0.0)],
        }
        for seed in range(2)
    ]
    rows = {row[0]: row[2:4] for row in report.rows_of(records)}
    assert rows[ARMS["single_pass"].title][1] == ""
    assert rows[ARMS["stock"].title][1] == "-10.0 ± 0.0"  # half of 0.2, whatever the seed


def test_the_page_is_what_the_committed_results_say(tmp_path):
    shutil.copy(report.PAGE, tmp_path / "README.md")
    report.write(RESULTS, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == report.PAGE.read_text()
