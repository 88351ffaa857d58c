"""A tiny model and a small file on disk, and the command in this process."""

import pytest

from support.small_files import write_examples, write_model
from trl_singlepass.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def run(capsys):
    """Run the command and return its exit code, its output and its errors."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run
