"""
TRL's own tests of its trainers, with this package's trainers in their place: which pass with TRL's alone?

    python tests/trl_suites.py FOLDER [sft dpo grpo rloo] [-- ARGUMENTS OF PYTEST]

FOLDER is a copy of TRL's repository at the release that is installed; nothing of it is kept. Each suite runs twice,
and tests that differ are printed, first those that `DIFFERENCES` does not know: with one of these, the script fails.
With `HF_HUB_OFFLINE=1`, tiny models, and datasets from TRL's own generator, stand in for the Hub; tests that need more
fail in both runs. `docs/migrating.md` says what the differences mean.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


TRAINERS = ("SFT", "DPO", "GRPO", "RLOO")
# Parts of the names of tests whose trainers differ from TRL's, as `docs/migrating.md` says.
DIFFERENCES = {
    "test_dataset_preparation_builds_labels_for_assistant_only_loss": "columns of prepared rows",
    "prompt_ids": "columns of prepared pairs",
}
_TEMPLATES = {"Qwen3": "qwen3", "GptOss": "gptoss", "Llama": "llama3", "Glm4": "glm4moe", "Cohere2": "cohere2"}
_ORG = "trl-internal-testing"


def pytest_configure(config) -> None:
    """As a plugin: exchange the trainers, and load what stands in for the Hub."""
    import datasets
    import trl

    import trl_singlepass

    for name in TRAINERS if os.environ["TRL_SUITES"] == "ours" else ():
        for kind in ("Trainer", "Config"):
            setattr(trl, name + kind, getattr(trl_singlepass, f"SinglePass{name}{kind}"))
    folder, load = Path(os.environ["HF_HOME"]) / "stand-ins", datasets.load_dataset

    def load_dataset(path, name=None, *args, split=None, **kwargs):
        stored = folder / str(path) / str(name or "default")
        if not stored.is_dir():
            return load(path, name, *args, split=split, **kwargs)
        found = datasets.load_from_disk(str(stored))
        found = found if split is None else found[split]
        return found.to_iterable_dataset() if kwargs.get("streaming") else found

    if folder.is_dir():
        datasets.load_dataset = load_dataset


def write_stand_ins(home: Path, repository: Path, tests: list[Path]) -> None:
    """Write the models and datasets that tests name where transformers and the plugin look for them."""
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from support.chat_tokenizers import make_tokenizer
    from support.tiny_models import CannotBuildError, without_router_loss

    types = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    text = "".join(path.read_text() for path in tests)
    for name, family, task in set(
        re.findall(rf"{_ORG}/(tiny-(\w+?)For(CausalLM|SequenceClassification)[\w.-]*)", text)
    ):
        template = next((template for prefix, template in _TEMPLATES.items() if family.startswith(prefix)), "qwen2_5")
        tokenizer = make_tokenizer(template)
        path = home / "hub" / f"models--{_ORG}--{name}"
        try:
            model = without_router_loss(types[f"{family}ForCausalLM"], vocab_size=len(tokenizer)).float()
        except (KeyError, CannotBuildError):
            continue
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        if task != "CausalLM":
            model.config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(model.config)
        for part in (tokenizer, model):
            part.save_pretrained(path / "snapshots" / "0")
        (path / "refs").mkdir()
        (path / "refs" / "main").write_text("0")
    _write_datasets(home / "stand-ins" / _ORG, repository / "scripts" / "generate_zen_dataset.py")


def _write_datasets(folder: Path, script: Path) -> None:
    """Run TRL's generator; what it would push to the Hub is written instead."""
    from unittest.mock import patch

    from datasets import DatasetDict

    def write(splits, repo_id, config_name="default", **_):
        splits.save_to_disk(str(folder / "zen" / config_name))

    spec = importlib.util.spec_from_file_location("generate_zen_dataset", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with patch.object(DatasetDict, "push_to_hub", write):
        module.main(0.1, True, "zen")


def run(repository: Path, tests: list[Path], trainers: str, home: Path, arguments: list[str]) -> dict[str, str]:
    """Return the outcome of each test, `passed`, `skipped` or the last line of its error."""
    here = Path(__file__).parent
    environment = {**os.environ, "TRL_SUITES": trainers, "HF_HOME": str(home)}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    report = home / f"{trainers}.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "trl_suites",
        "-q",
        f"--junitxml={report}",
        f"--rootdir={repository}",
    ]
    names = [str(path.relative_to(repository)) for path in tests]
    subprocess.run([*command, *names, *arguments], cwd=repository, env=environment, stdout=sys.stderr, check=False)
    from xml.etree import ElementTree

    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        child = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        name = f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"
        outcomes[name] = "passed" if child is None else "skipped" if child.tag == "skipped" else child.get("message")
    return outcomes


def main(arguments: list[str]) -> int:
    """Compare both runs; 1 if a test differs that `DIFFERENCES` does not know."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    (folder, *suites), rest = arguments[:end], arguments[end + 1 :]
    repository = Path(folder).resolve()
    tests = [repository / "tests" / f"test_{name}_trainer.py" for name in suites or map(str.lower, TRAINERS)]
    with TemporaryDirectory() as made:
        home = Path(made)
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            write_stand_ins(home, repository, tests)
        stock, ours = (run(repository, tests, trainers, home, rest) for trainers in ("stock", "ours"))
    differ = {name for name, outcome in stock.items() if outcome == "passed" and ours.get(name) != "passed"}
    known = {name for name in differ if any(part in name for part in DIFFERENCES)}
    passed = sum(outcome == "passed" for outcome in stock.values())
    lines = [f"{len(stock)} tests, {passed} pass with TRL's trainers, {len(differ)} of them not with this package's:"]
    for name in [*sorted(differ - known), *sorted(known)]:
        kind = "known: " if name in known else ""
        lines.append(f"- {kind}{name}: {' '.join(str(ours.get(name)).split())[:300]}")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(bool(differ - known))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
