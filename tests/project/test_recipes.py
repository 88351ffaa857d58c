"""The command reads every recipe, a step of it trains, and it reaches the number that the table promises."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from demo.load import load_rows
from examples import screen_agent
from support.chat_tokenizers import make_tokenizer, template_text
from support.small_repository import DEMO_DATA, DEMO_MODEL, DEMO_PAIRS, as_a_reader, make_small_repository, run_python
from support.tiny_models import tiny_config
from support.tiny_vision import save_vision_checkpoint
from trl_singlepass import SinglePassDPOTrainer, SinglePassGRPOTrainer, SinglePassSFTTrainer, audit
from trl_singlepass.cli import launch
from trl_singlepass.cli.demo import DATA, as_pairs, write_demo_data, write_demo_model, write_demo_pairs
from trl_singlepass.scripts import dpo, grpo, sft


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TOKENIZER = ROOT.parent / "shared" / "tokenizers" / "qwen3"
TABLE = (ROOT / "recipes" / "README.md").read_text()
# Settings that make any recipe run on a CPU in a second.
TINY = ["--bf16", "false", "--dtype", "float32", "--max_steps", "1", "--save_strategy", "no", "--report_to", "none"]
ONE_STEP = [*TINY, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
FAMILIES = {"gpt-oss-20b": ("gptoss", "gpt_oss"), "qwen3.5-4b": ("qwen3_5_think", "qwen3_5_text")}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def name_of(path):
    return path.name.removesuffix(".yaml")


def command_of(name):
    return next((command for command in ("dpo", "grpo") if f"-{command}" in name), "train")


def script_of(name):
    return {"dpo": dpo, "grpo": grpo, "train": sft}[command_of(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_small_repository(tmp_path_factory.mktemp("repository"))
    with as_a_reader(folder) as patch:
        run_python(["examples/agent_turns.py", "--max_steps", "1"], patch)
    for name, (template, model_type) in FAMILIES.items():
        tokenizer = make_tokenizer(template)
        config = tiny_config(model_type, vocab_size=len(tokenizer))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "out" / name)
        tokenizer.save_pretrained(folder / "out" / name)
    save_vision_checkpoint("qwen3_vl", folder / "out" / "qwen3-vl-8b")
    # That of the model that does not think, and TRL has no other, is replaced by that of the next one.
    (folder / "out" / "qwen3-vl-8b" / "chat_template.jinja").write_text(template_text("qwen3_5_think"))
    with as_a_reader(folder) as patch:
        run_python(["examples/screen_agent.py", "--data", "out/screens.parquet"], patch)
        run_python(["examples/agent_grpo.py", "--data", "out/sums.jsonl"], patch)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_trains_a_step(path, folder, monkeypatch):
    """With a tiny model of the same family instead of the one on the Hub."""
    settings = yaml.safe_load(path.read_text())
    local = Path("out") / (path.stem if path.stem in (*FAMILIES, "qwen3-vl-8b") else "demo-model")
    with as_a_reader(folder):
        arguments = ["--config", str(path), "--model_name_or_path", str(local), *ONE_STEP]
        if command_of(path.stem) == "grpo":  # a batch holds whole groups
            arguments += ["--per_device_train_batch_size", "2", "--num_generations", "2"]
        if settings.get("use_vllm"):
            arguments += ["--use_vllm", "false", "--max_completion_length", "4"]
        if settings.get("load_in_4bit"):
            pytest.importorskip("bitsandbytes")
            # On CPUs with AVX512-BF16, it repacks weights for inference, in blocks larger than the model.
            monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        if "model_init_kwargs" in settings:
            arguments += ["--model_init_kwargs", "{}"]
        script, training, model, datasets, others = (
            script_of(path.stem).make_parser().parse_args_and_config(arguments, return_remaining_strings=True)
        )
        assert script.dataset_name == settings["dataset_name"]
        launched = launch_command_parser().parse_args([*launch.with_config_file(others), "train.py"])
        assert launched.num_machines == settings.get("num_machines")
        script_of(path.stem).main(script, training, model, datasets)
    assert list((folder / training.output_dir).glob("*.safetensors"))


def rows_of_the_table():
    lines = [line for line in TABLE.splitlines() if line.startswith("| [")]
    return {re.match(r"\| \[([\w.-]+)\]", line)[1]: [cell.strip() for cell in line.split("|")[1:-1]] for line in lines}


def test_the_table_has_every_recipe_with_its_command():
    rows = rows_of_the_table()
    assert sorted(rows) == sorted(map(name_of, RECIPES))
    for name, (link, model, *_, command, number) in rows.items():
        settings = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        assert link == f"[{name}]({name}.yaml)"
        assert command.startswith(f"`trl-singlepass {command_of(name)} --config recipes/{name}.yaml")
        assert ("--machine_rank" in command) == ("num_machines" in settings)
        assert settings["model_name_or_path"] in model or settings["model_name_or_path"].startswith("out/")
        assert ("measured" in number) == settings.get("use_cpu", False)
        assert ("predicted, not run" in number) != ("measured" in number)


def test_screens_are_encoded_as_often_as_the_table_says():
    episodes = screen_agent.make_episodes(screen_agent.parse([]))
    turns = [len(episode["images"]) for episode in episodes]
    every_turn = sum(shown for count in turns for shown in range(1, count + 1))
    expected = f"{sum(turns)} image encodings instead of {every_turn} (predicted, not run)"
    assert rows_of_the_table()["qwen3-vl-8b"][-1] == expected


SIZES = {
    "qwen3-0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "qwen3-8b": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
    "qwen3-32b": {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "intermediate_size": 25600},
}
PREDICTED = {  # recipe: chat template, sizes
    "qwen3-0.6b": (None, "qwen3-0.6b"),
    "qwen3-8b-lora": (None, None),
    "qwen3-8b-qlora": (None, None),
    "qwen3-8b-fsdp2": (None, "qwen3-8b"),
    "qwen3-32b-zero3": (None, "qwen3-32b"),
    "gpt-oss-20b": ("gptoss", None),
    "qwen3.5-4b": ("qwen3_5_think", None),
    "streaming": (None, "qwen3-0.6b"),
    "qwen3-8b-dpo-lora": (None, None),
}


@pytest.mark.slow
@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs Qwen3's tokenizer in ../shared")
@pytest.mark.parametrize("name", PREDICTED)
def test_predictions_are_what_audit_counts(name):
    template, model = PREDICTED[name]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if template is not None:
        tokenizer.chat_template = template_text(template)
    config = None
    if model is not None:
        config = Qwen3Config(num_key_value_heads=8, head_dim=128, vocab_size=151_936, **SIZES[model])
    rows = load_rows(None, 10**6)
    if command_of(name) == "dpo":
        rows = list(as_pairs(list(map(json.loads, DATA.read_text().splitlines()))))
    forecast = audit(rows, tokenizer, config, sample_size=len(rows)).forecast
    promised = rows_of_the_table()[name][-1]
    expected = f"sharing factor {forecast.sharing_factor.value:.2f}"
    if config is not None:
        expected += f", speed-up {forecast.over_npass.value:.2f}"
    assert promised == f"{expected} (predicted, not run)"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu-smoke", "cpu-smoke-dpo", "cpu-smoke-grpo", "tokenized-turns"])
def test_measured_numbers_are_reached(name, tmp_path):
    """With the demo's model and all of its data, as in the recipe."""
    for path in ROOT.iterdir():
        if path.name not in ("out", ".git"):
            (tmp_path / path.name).symlink_to(path)
    key, which, promised = re.match(r"(loss|reward) (below|above) ([\d.]+)", rows_of_the_table()[name][-1]).groups()
    write_demo_model(str(tmp_path / DEMO_MODEL))
    write_demo_data(str(tmp_path / DEMO_DATA))
    write_demo_pairs(str(tmp_path / DEMO_PAIRS))
    with as_a_reader(tmp_path) as patch:
        run_python(["examples/agent_turns.py", "--max_steps", "1"], patch)
        for trainer in (SinglePassSFTTrainer, SinglePassDPOTrainer, SinglePassGRPOTrainer):
            patch.setattr(trainer, "save_model", lambda self, folder: logged.extend(self.state.log_history))
        logged = []
        arguments = ["--config", f"recipes/{name}.yaml"]
        script = script_of(name)
        script.main(*script.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False))
    reached = [entry[key] for entry in logged if key in entry][-1]
    assert reached < float(promised) if which == "below" else reached > float(promised)
