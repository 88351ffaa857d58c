"""The DPO script: pairs with tools in a file, and a checkpoint that has changed."""

import json

import pytest

from support.chat_tokenizers import make_tokenizer
from trl_singlepass.data.pairs import example_to_pair
from trl_singlepass.data.settings import PairSettings
from trl_singlepass.scripts import dpo


TRAIN = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]


def train(*arguments):
    given = [str(argument) for argument in arguments]
    dpo.main(*dpo.make_parser().parse_args_and_config([*given, "--dtype", "float32"], fail_with_unknown_args=False))


def test_script_trains_on_a_file_and_writes_a_card(model, pairs, trained, tmp_path):
    out = tmp_path / "out"
    train("--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", out, *TRAIN)
    assert (out / "model.safetensors").is_file()
    (trainer,) = trained
    tokenizer = make_tokenizer()
    for row, line in zip(trainer.train_dataset, pairs.read_text().splitlines(), strict=True):
        rendered = example_to_pair(json.loads(line), 0, tokenizer, PairSettings())
        assert sum(row["multiplicity"]) == sum(map(len, rendered.samples))
    card = (out / "README.md").read_text()
    assert "None" not in card
    assert "- Data: 13 turns of 4 pairs; " in card
    assert f"- Trained tokens: {trainer.state.log_history[-1]['num_trained_tokens']:.10g}\n" in card
    assert "https://huggingface.co/papers/2305.18290" in card


@pytest.mark.slow
def test_a_changed_checkpoint_is_not_resumed(model, pairs, tmp_path):
    out = tmp_path / "out"
    given = ["--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", out, *TRAIN]
    train(*given, "--save_strategy", "steps", "--save_steps", 1)
    weights = out / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be resumed: model\.safetensors"):
        train(*given, "--max_steps", 2, "--resume_from_checkpoint", out / "checkpoint-1")
