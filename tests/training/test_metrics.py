"""Metrics by turn: every label knows its turn and part, and the log holds what separate samples give."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat, tool_chat
from support.sample_sets import sample_sets
from support.trainers import as_dataset, float32_model, needs_weighted_loss, single_pass_trainer
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.training.metrics import NUM_TURNS
from trl_singlepass.trees.prefix_tree import PrefixTree, sample_paths
from trl_singlepass.trees.rows import Row, TreePlan
from trl_singlepass.trees.sample import PARTS, Sample
from trl_singlepass.trees.sharing import merge_rows


pytestmark = [
    needs_weighted_loss,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # TRL still sets it
]
CONVERSATIONS = [chat(3), chat(1, seed=1), tool_chat(), chat(4, seed=2), chat(2, seed=3)]
GROUPS = {"": PARTS, "reasoning_": PARTS[:1], "answer_": PARTS[1:], "first_answer_token_": PARTS[1:2]}


def with_turns(samples):
    return [replace(sample, turn_index=turn) for turn, sample in enumerate(samples)]


def parts_of_first_sample(samples, paths):
    """For each label of a row, the part of the first sample that trains it."""
    parts = {}
    for sample, path in zip(samples, paths, strict=True):
        for position in np.flatnonzero(sample.loss_weights):
            parts.setdefault(int(path[position - 1]) + 1, int(sample.token_parts[position]))
    return parts


@given(sample_sets())
def test_every_label_is_part_of_the_first_sample_that_trains_it(samples):
    samples = with_turns(samples)
    tree = PrefixTree.from_samples(samples)
    expected = np.zeros(len(tree), np.int64)
    for label, part in parts_of_first_sample(samples, sample_paths(tree, samples)).items():
        expected[label] = part
    assert tree.targets.label_parts.tolist() == expected.tolist()


@given(sample_sets(), st.integers(1, 6))
def test_rows_that_share_a_beginning_keep_the_parts_of_their_labels(samples, samples_per_row):
    samples = with_turns(samples)
    starts = range(0, len(samples), samples_per_row)
    rows = [Row.from_tree(PrefixTree.from_samples(samples[start : start + samples_per_row])) for start in starts]
    assert targets_of(merge_rows(rows)) == targets_of(Row.from_tree(PrefixTree.from_samples(samples)))


def targets_of(row):
    """Targets with their weights and parts; equally shared branches may lie in another order."""
    return sorted(zip(*row.targets(TreePlan.from_subtree_end(row.subtree_end)), strict=True))


def test_parts_of_a_sample():
    sample = Sample([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 1, 1, 1], 2, reasoning_length=2, turn_index=3)
    first = 1 + 3 * len(PARTS)
    assert sample.token_parts.tolist() == [0, 0, first, first, first + 1, first + 2, first + 2]
    assert sample.truncated(4).token_parts.tolist() == [0, 0, first, first]


def npass_metrics(model, tokenizer, conversations, **settings):
    """The same metrics from one forward pass per sample."""
    sums = defaultdict(lambda: np.zeros(3))
    for index, messages in enumerate(conversations):
        for sample in example_to_samples({"messages": messages}, index, tokenizer, RowSettings(**settings)).samples:
            turn = sum(message["role"] == "assistant" for message in messages[: sample.message_index]) + 1
            with torch.no_grad():
                logits = model(torch.tensor(sample.token_ids)[None]).logits[0, :-1].double()
            targets = torch.tensor(sample.token_ids)[1:]
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
            correct = (logits.argmax(-1) == targets).numpy()
            for position in range(len(targets)):
                weight = sample.loss_weights[position + 1]
                values = weight * np.array([1.0, nll[position], correct[position]])
                offset = position + 1 - sample.prompt_length - sample.reasoning_length
                part = PARTS[min(max(offset, -1) + 1, 2)]
                for name in (f"turn/{turn}", "turn/all"):
                    sums[name, part] += values
    means = {}
    for name in {name for name, _ in sums}:
        for prefix, parts in GROUPS.items():
            weight, loss, correct = sum(sums[name, part] for part in parts)
            if weight > 0:
                means |= {f"{name}/{prefix}loss": loss / weight, f"{name}/{prefix}accuracy": correct / weight}
    return means


CASES = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "packing, weights": {
        "packing": True,
        "max_row_tokens": 400,
        "loss_reduction": "turn",
        "reasoning_weight": 0.25,
    },
    "splitting, waves": {"max_row_tokens": 180, "wave_tokens": 40},
    "last turn": {"train_turns": "last"},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_log_holds_what_separate_samples_give(tmp_path, settings):
    tokenizer = make_tokenizer("qwen3")
    model = float32_model(tokenizer)
    # A learning rate of 0, so that all steps measure one model; one log for the whole epoch.
    run = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, "logging_steps": 1000, **settings}
    run |= {"per_device_train_batch_size": 2, "log_turn_metrics": True, "eval_packing": False}
    trainer = single_pass_trainer(
        tmp_path, tokenizer, CONVERSATIONS, model, kwargs={"eval_dataset": as_dataset(CONVERSATIONS)}, **run
    )
    rows = {name: settings[name] for name in ("loss_reduction", "reasoning_weight", "train_turns") if name in settings}
    expected = npass_metrics(model, tokenizer, CONVERSATIONS, **rows)
    trainer.train()
    evaluation = trainer.evaluate()
    (log,) = [entry for entry in trainer.state.log_history if "turn/all/loss" in entry]
    assert {name for name in log if "/" in name} == set(expected)
    for name, value in expected.items():
        assert log[name] == pytest.approx(value, rel=1e-5), name
        assert evaluation[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


def test_later_turns_are_logged_together_and_nothing_unless_asked_for(tmp_path):
    tokenizer = make_tokenizer("qwen3")
    trainer = single_pass_trainer(tmp_path, tokenizer, [chat(NUM_TURNS + 3)], log_turn_metrics=True)
    trainer.train()
    names = {name.rsplit("/", 1)[0] for name in trainer.state.log_history[0] if "/" in name}
    assert names == {*(f"turn/{turn}" for turn in range(1, NUM_TURNS + 1)), f"turn/after_{NUM_TURNS}", "turn/all"}
    trainer = single_pass_trainer(tmp_path, tokenizer, [chat(2)])
    trainer.train()
    assert not any("/" in name for entry in trainer.state.log_history for name in entry)


def test_the_terminal_shows_a_table_and_trackers_every_number(tmp_path, capsys):
    settings = {"log_turn_metrics": True, "logging_steps": 1, "max_steps": 12, "disable_tqdm": True}
    trainer = single_pass_trainer(tmp_path, make_tokenizer("qwen3"), [chat(2), chat(3, 1)], **settings)
    seen = []
    trainer.add_callback(Tracker(seen))
    trainer.train()
    assert all("turn/2/answer_loss" in logs for logs in seen[:12])
    assert sum("turn/2/answer_loss" in entry for entry in trainer.state.log_history) == 12
    out = capsys.readouterr().out
    assert "turn/2/" not in out
    assert [line.split()[0] for line in out.splitlines() if line.strip().startswith("turn/all ")] == ["turn/all"] * 2


class Tracker(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))
