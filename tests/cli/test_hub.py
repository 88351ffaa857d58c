"""Without a network: one attempt, then only what is cached."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from trl_singlepass.cli.main import check_hub


@pytest.fixture
def endpoint(monkeypatch):
    """A Hub that never answers: an address of a network for documentation, to which nothing is routed."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.mark.usefixtures("endpoint")
def test_a_wrong_model_fails_fast_without_a_network():
    start = time.monotonic()
    with pytest.raises(ValueError, match="no-such/model cannot be loaded: it is neither a folder nor in the cache"):
        check_hub("no-such/model", None)
    assert time.monotonic() - start < 5
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # for processes that are started later


def test_the_error_of_a_wrong_model_imports_no_library_that_takes_seconds():
    code = """
import sys
from trl_singlepass.cli import main
code = main(["train", "--model_name_or_path", "no-such/model"])
heavy = {"torch", "transformers", "datasets", "accelerate"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy or code != 2 else 0)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no-such/model cannot be loaded" in done.stderr


@pytest.mark.usefixtures("endpoint")
def test_the_hub_is_asked_once(monkeypatch):
    asked = []

    def ask():
        asked.append(True)
        raise OSError

    monkeypatch.setattr("huggingface_hub.utils.get_session", ask)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be loaded"):
            check_hub("no-such/model", "no-such/data")
    assert len(asked) == 1


@pytest.mark.usefixtures("endpoint")
def test_cached_models_and_local_files_are_fine(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model, file: f"/cache/{file}")
    check_hub("some/model", "some/data")
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("asked the Hub for local files"))
    check_hub(str(tmp_path), None)


def test_a_path_that_is_no_hub_id_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a folder nor the id of a model"):
        check_hub("out/demo/model", None)
