"""A tiny model and a small file on disk, and the command in this process."""

import pytest

from support.small_files import data as data
from support.small_files import model as model
from trl_singlepass.cli.main import main


@pytest.fixture
def run(capsys):
    """Run the command and return its exit code, its output and its errors."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run
