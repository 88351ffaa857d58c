"""The training script on files, with a signal, and with what is missing."""

from pathlib import Path

import datasets
import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import chat
from support.small_files import UNREADABLE, examples
from trl_singlepass import SinglePassSFTTrainer
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.scripts import sft
from trl_singlepass.scripts.run import load_splits
from trl_singlepass.training.checkpoints import checkpoint_to_resume


TRAIN = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]


def trained(folder):
    return (Path(folder) / "model.safetensors").is_file()


def parse(arguments):
    return sft.make_parser().parse_args_and_config([str(argument) for argument in arguments])


def test_script_trains_on_a_file_with_tool_calls_of_both_forms(model, data, tmp_path, monkeypatch):
    seen = []
    original = SinglePassSFTTrainer.__init__

    def remember(self, **kwargs):
        seen.append(kwargs)
        original(self, **kwargs)

    monkeypatch.setattr(SinglePassSFTTrainer, "__init__", remember)
    arguments = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", tmp_path / "out", *TRAIN]
    sft.main(*parse([*arguments, "--dtype", "float32"]))
    assert trained(tmp_path / "out")
    tokenizer = make_tokenizer()
    for row, original_row in zip(seen[0]["train_dataset"], examples(), strict=True):
        ours, expected = render_example(row, tokenizer), render_example(original_row, tokenizer)
        assert [sample.token_ids.tolist() for sample in ours] == [sample.token_ids.tolist() for sample in expected]


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("false", None), ("here/checkpoint-3",) * 2])
def test_a_path_to_resume_from_is_taken_as_it_is(tmp_path, given, expected):
    assert checkpoint_to_resume(given, tmp_path) == expected


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_script_streams_a_file(data, tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(Path(data).read_bytes())
    if suffix == "parquet":
        datasets.Dataset.from_list([{"messages": chat(2)}] * 4).to_parquet(path)
    arguments = ["--dataset_name", path, "--output_dir", tmp_path, *TRAIN]
    for streaming, kind in (("true", datasets.IterableDataset), ("false", datasets.Dataset)):
        script, _, _, mixture = parse([*arguments, "--dataset_streaming", streaming])
        rows = load_splits(script, mixture)["train"]
        assert isinstance(rows, kind)
        assert len(list(rows)) == 4


def test_script_reads_a_config_file_and_flags_win(tmp_path):
    (tmp_path / "c.yaml").write_text("model_name_or_path: m\ndataset_name: d\nmax_length: 7\nwave_tokens: auto\n")
    script, training, model_args, _ = parse(["--config", tmp_path / "c.yaml", "--max_length", 9, *TRAIN])
    assert (script.dataset_name, model_args.model_name_or_path) == ("d", "m")
    assert (training.max_length, training.wave_tokens) == (9, "auto")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "No data"),
        (["--dataset_name", "none.jsonl"], "There is no file none.jsonl"),
        (["--dataset_name", "{data}", "--eval_strategy", "steps"], "no split 'test'"),
    ],
)
def test_script_names_what_is_missing(model, data, tmp_path, extra, message):
    extra = [argument.format(data=data) for argument in extra]
    with pytest.raises(ValueError, match=message):
        sft.main(*parse(["--model_name_or_path", model, "--output_dir", tmp_path, *TRAIN, *extra]))


@pytest.mark.parametrize("name", [*UNREADABLE, "broken.jsonl"])
def test_a_file_that_cannot_be_read_is_named_in_an_error_of_the_user(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(UNREADABLE.get(name, "{nope\n").encode("latin-1"))
    script, _, _, mixture = parse(["--dataset_name", path, "--output_dir", tmp_path, *TRAIN])
    with pytest.raises(ValueError, match=name):
        load_splits(script, mixture)


@pytest.mark.parametrize(
    ("flags", "config", "way_out"),
    [
        (["--streaming", "true"], "dataset_name: {data}", "dataset_streaming=True"),
        (["--test_split_size", "0.5"], "dataset_name: {data}", "dataset_test_split"),
        (["--dataset_streaming", "true"], "datasets:\n  - path: json\n    data_files: {data}", " streaming=True"),
    ],
)
def test_settings_of_another_kind_of_dataset_are_refused(data, tmp_path, flags, config, way_out):
    (tmp_path / "c.yaml").write_text(config.format(data=data))
    script, _, _, mixture = parse(["--config", tmp_path / "c.yaml", *flags, *TRAIN])
    with pytest.raises(ValueError, match=flags[0].removeprefix("--")) as caught:
        load_splits(script, mixture)
    assert way_out in str(caught.value)


@pytest.mark.parametrize("given", ["all", "last", "2", "sample:3"])
def test_turns_can_be_chosen_on_the_command_line(given):
    assert parse(["--train_turns", given, *TRAIN])[1].train_turns == given
