"""
Every code block in the README, CONTRIBUTING.md and docs/ does what it says.

Python runs, `trl-singlepass` commands run in this process, and JSON and YAML are read by the code that reads them.
Commands that start other machines or build environments are checked without running them, and `slow` runs every block
in a real shell. A block that neither runs nor is checked says why in an HTML comment before it:
`<!-- skip: next "why" -->`.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from markdown.extensions.toc import slugify
from sybil import Sybil
from sybil.parsers.abstract.lexers import LexerCollection
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from torch.distributed.run import get_args_parser as torchrun_parser

from demo.load import load_tokenizer
from support.small_repository import DEMO_MODEL, as_a_reader, make_small_repository, run_python
from trl_singlepass import cli
from trl_singlepass.cli import launch
from trl_singlepass.reference import doctor
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.scripts import sft


ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "recipes", ROOT / "docs"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(page for f in FOLDERS for page in sorted(f.glob("*.md")))]
UNCHECKED = {"text", "bibtex"}  # output, trees, citations: nothing that a reader would run
ON_CPU = ["--bf16", "false", "--output_dir", "out"]
# Fewer conversations than the block asks for, in the commands that run both ways on them.
SHORTER = {"verify": ["-n", "1"], "bench": ["-n", "1", "--repeats", "1"]}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


# How commands are checked --------------------------------------------------------------------------------------------


def run_command(words, patch):
    """Run one command of a block, or check it if it cannot run here."""
    if ">" in words:
        *words, _, file = words
        with Path(file).open("w") as output, contextlib.redirect_stdout(output):
            run_command(words, patch)
        return
    command, *arguments = words
    if command == "export":
        patch.setenv(*arguments[0].split("=", 1))
    elif command == "trl-singlepass":
        assert cli.main([*arguments, *SHORTER.get(arguments[0], [])]) == 0
    elif command == "python":
        run_python(arguments, patch)
    else:
        CHECKS[command](arguments)


def check_make(arguments):
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def check_pip(arguments):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    (named,) = (re.fullmatch(r"(?:\.|trl-singlepass)(?:\[(\w+)\])?", argument)[1] for argument in arguments[1:])
    assert named is None or named in extras


def check_activation(arguments):
    assert arguments == [".venv/bin/activate"]
    assert "VENV := .venv" in (ROOT / "Makefile").read_text()


def check_accelerate(arguments):
    """tests/distributed/test_launches.py runs these lines, on two "nodes"."""
    parsed = launch_command_parser().parse_args(arguments[1:])
    assert arguments[0] == "launch"
    assert Path(parsed.config_file).is_file()
    if parsed.module:
        assert parsed.training_script == launch.SCRIPTS["train"]
        check_settings(parsed.training_script_args)


def check_settings(arguments):
    """Settings unknown to the script must be arguments of `accelerate launch`."""
    *_, others = sft.make_parser().parse_args_and_config([*arguments, *ON_CPU], return_remaining_strings=True)
    launch_command_parser().parse_args([*launch.with_config_file(others), "train.py"])


def check_torchrun(arguments):
    assert torchrun_parser().parse_args(arguments).training_script.endswith(".py")


def check_deepspeed(arguments):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    parsed = runner.parse_args(arguments)
    assert Path(parsed.hostfile).is_file()
    assert parsed.user_script.endswith(".py")


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    ".": check_activation,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "deepspeed": check_deepspeed,
}


def short_examination(examine, *args, turns, **kwargs):
    """Stand in for the doctor's examination: with one short conversation."""
    return examine(*args, turns=(2,), **kwargs)


def in_this_process(args):
    """Stand in for `accelerate launch`: run the first step of what it would start, in this process."""
    command, *arguments = [*args.training_script_args, "--max_steps", "1"]
    script = importlib.import_module(launch.SCRIPTS[command])
    script.main(*script.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False))


# How blocks are checked ----------------------------------------------------------------------------------------------


def evaluate_bash(example):
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        words = [os.path.expandvars(word) for word in shlex.split(line, comments=True)]
        if words:
            run_command(words, example.namespace["patch"])


def evaluate_json(example):
    row = json.loads(example.parsed)
    if "messages" in row:
        assert render_example(row, load_tokenizer(None))


def evaluate_yaml(example):
    path = Path("block.yaml")
    path.write_text(example.parsed)
    assert isinstance(yaml.safe_load(example.parsed), dict)
    check_settings(["--config", str(path)])


def evaluate_diff(example):
    """Both the removed and the added lines run."""
    added = [line[1:] for line in str(example.parsed).splitlines() if line.startswith("+")]
    removed = [line[1:] for line in str(example.parsed).splitlines() if line.startswith("-")]
    for lines in (added, removed):
        exec("\n".join(line.strip() for line in lines), {})


EVALUATORS = {"bash": evaluate_bash, "json": evaluate_json, "yaml": evaluate_yaml, "diff": evaluate_diff}
PARSERS = [
    SkipParser(),
    PythonCodeBlockParser(),
    *(CodeBlockParser(language, evaluate) for language, evaluate in EVALUATORS.items()),
]
DOCUMENTS = [Sybil(PARSERS, path=str(ROOT), patterns=["*.md"]).parse(path) for path in PAGES]
EXAMPLES = [
    pytest.param(example, id=f"{Path(document.path).relative_to(ROOT)}:{example.line}")
    for document in DOCUMENTS
    for example in document.examples()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_repository(tmp_path_factory.mktemp("repository"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_block(example, folder):
    example.namespace.clear()  # every block runs pasted alone
    with as_a_reader(folder) as patch:
        patch.setattr(launch, "launch_command", in_this_process)
        patch.setattr(doctor, "examine", partial(short_examination, doctor.examine))
        example.namespace["patch"] = patch
        example.evaluate()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: Path(document.path).name)
def test_every_block_says_what_it_is(document):
    lexer = LexerCollection([RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))])
    languages = [region.lexemes["language"].strip() for region in lexer(document)]
    assert set(languages) <= {"python", *EVALUATORS, *UNCHECKED}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(Path(document.path).relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document):
    """`make docs` checks links and anchors within docs/, but not those of the README."""
    page = Path(document.path)
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#([^)]+))?\)", document.text)
    for target, anchor in links:
        path = page.parent / target
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {slugify(heading, "-") for heading in headings}, f"{target}#{anchor}"


def is_skipped(example):
    """Whether a comment before a block says why it does not run."""
    comment = example.document.text[: example.start].rstrip().rpartition("\n")[2]
    return comment.lstrip().startswith("<!-- skip:")


def writers(example, folder):
    """Return the scripts that stand above a block and write a file that it reads."""
    missing = [name for name in re.findall(r"[\w-]+\.jsonl", str(example.parsed)) if not (folder / name).exists()]
    above = [other for other in example.document.examples() if other.line < example.line]
    return [
        other for other in above if any(re.search(rf'"{name}"\)\.write_text', str(other.parsed)) for name in missing)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if example.values[0].region.evaluator is evaluate_bash]
)
def test_block_in_a_shell(example, folder):
    """As a reader would run it, with nothing replaced but the model, through its variable."""
    block = str(example.parsed)
    if is_skipped(example):
        pytest.skip("says that it does not run")
    if "NODE_RANK" in block or any(re.match(rf"{re.escape(name)} ", block) for name in CHECKS):
        pytest.skip("builds an environment or starts several machines")
    for script in writers(example, folder):
        subprocess.run([sys.executable, "-c", str(script.parsed)], cwd=folder, check=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MODEL": str(DEMO_MODEL), "HF_HUB_OFFLINE": "1"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment, check=True)
