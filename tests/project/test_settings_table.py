"""docs/training.md has every field of the installed releases, and what it calls refused is refused."""

import ast
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import trl
from packaging.version import Version
from trl import SFTConfig

from support.conversations import chat
from support.trainers import SETTINGS, as_dataset, logged, single_pass_trainer
from trl_singlepass import SinglePassSFTConfig


pytestmark = pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")
PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*)\|$", PAGE, re.M)
PLAIN = PAGE.partition("### Followed without a remark")[2].partition("## ")[0]
REFUSED = {name: status.split("`")[1] for name, status, _ in ROWS if status.startswith("refused")}
CHATS = [chat(2), chat(2, seed=1), chat(1, seed=2)]


def refused_values(name):
    """Parse `packing=True, packing_strategy='wrapped'` to a dictionary."""
    call = ast.parse(f"f({REFUSED[name]})").body[0].value
    return {item.arg: ast.literal_eval(item.value) for item in call.keywords}


def test_every_field_of_the_installed_releases_is_decided_once():
    counts = Counter([*(name for name, _, _ in ROWS), *re.findall(r"`(\w+)`", PLAIN)])
    assert max(counts.values()) == 1
    installed = {field.name for field in fields(SinglePassSFTConfig)}
    assert installed - counts.keys() == set(), "decide what these do, and write it in docs/training.md"
    if Version(trl.__version__) >= Version("1.16"):
        assert counts.keys() - installed == set()


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_table_calls_refused_is_refused_by_name(tmp_path, tokenizer, name):
    settings = refused_values(name)
    assert name in settings
    with pytest.raises(ValueError, match=name):
        single_pass_trainer(tmp_path, tokenizer, CHATS, **settings)


@pytest.mark.parametrize("name", REFUSED)
def test_an_evaluation_set_of_conversations_is_refused_as_well(tmp_path, tokenizer, name):
    settings = refused_values(name)
    if name == "dataset_kwargs":
        pytest.skip("unprepared text is TRL's matter, and so is what is evaluated beside it")
    with pytest.raises(ValueError, match=name):
        single_pass_trainer(
            tmp_path, tokenizer, [{"text": "plain"}], kwargs={"eval_dataset": as_dataset(CHATS)}, **settings
        )


@pytest.fixture(scope="module")
def plain_loss(tmp_path_factory, tokenizer):
    trainer = single_pass_trainer(tmp_path_factory.mktemp("plain"), tokenizer, CHATS, per_device_train_batch_size=3)
    trainer.train()
    return logged(trainer, "loss")


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "batch_rebalance"},
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "group_by_length", "length_column_name": "none"},
        {"accelerator_config": {"split_batches": True}},
        {"remove_unused_columns": False},
        {"padding_free": True},
        {"use_cache": True},
        {"dataset_text_field": "none"},
        {"completion_only_loss": True, "assistant_only_loss": True},
        {"gradient_checkpointing_kwargs": {"selective": True}},
        {"average_tokens_across_devices": False},
        {"auto_find_batch_size": True},
    ],
    ids=lambda settings: next(iter(settings.items()))[0],
)
def test_settings_that_should_not_change_the_loss_do_not(tmp_path, tokenizer, plain_loss, settings):
    trainer = single_pass_trainer(tmp_path, tokenizer, CHATS, per_device_train_batch_size=3, **settings)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(plain_loss, abs=1e-6)


def test_trls_default_of_assistant_only_loss_counts_as_not_set(tmp_path, tokenizer):
    single_pass_trainer(tmp_path, tokenizer, CHATS, config=SFTConfig)
    assert SinglePassSFTConfig(str(tmp_path), **SETTINGS).assistant_only_loss is None


@pytest.mark.parametrize(
    "setting", [{"packing": True, "packing_strategy": "wrapped"}, {"truncation_mode": "keep_end"}]
)
def test_plain_text_follows_what_conversations_cannot(tmp_path, tokenizer, setting):
    trainer = single_pass_trainer(tmp_path, tokenizer, [{"text": "one two three " * 9}] * 3, max_length=8, **setting)
    assert {len(row) for row in trainer.train_dataset["input_ids"]} <= set(range(1, 9))
    trainer.train()
