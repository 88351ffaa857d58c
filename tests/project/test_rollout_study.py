"""The study of rollouts: the reward wants the thought said again, arms differ in contexts, the page is true."""

import json

import pytest

from studies.rollouts import __main__ as study


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")


def test_the_second_answer_has_to_be_the_first_thought():
    rollouts = [study.conversation("3", said, answer) for said, answer in (("3", "3"), ("5", "3"), ("5", "5"))]
    assert study.reward(rollouts) == [1.0, 1.0, 0.0]
    assert study.parse("<think> 3 </think> 5 <end>") == {"reasoning_content": "3", "content": "5"}
    assert study.reward([[{"role": "user"}, {"role": "assistant", **study.parse("5 <end>")}]]) == [0.0]


def test_only_kept_contexts_hold_the_thought():
    tokenizer, messages = study.make_tokenizer(), study.conversation("3", "5", "3")[:3]
    texts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
        for options in study.ARMS.values()
    ]
    assert ["3" in text for text in texts] == [False, True]


def test_arms_are_trained_and_measured():
    runs = study.run(seed=0, steps=1, every=1, start_steps=2)
    assert [(run["arm"], run["step"]) for run in runs] == [(arm, [0, 1]) for arm in study.ARMS]
    assert all(0 <= value <= 1 for run in runs for value in run["served"] + run["kept"])


def test_the_page_is_the_results():
    runs = json.loads(study.RESULTS.read_text())["runs"]
    assert len({run["seed"] for run in runs}) >= 5
    assert study.table(runs) in (study.RESULTS.parent / "README.md").read_text()
