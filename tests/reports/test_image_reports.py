"""Images in reports: numbered in the terminal, thumbnails in the page, counted by an audit."""

import re

import pytest
from rich.console import Console

from support.image_forms import CHAT, answer, in_column, user
from support.tiny_vision import save_vision_checkpoint, tiny_processor
from trl_singlepass import audit
from trl_singlepass.cli.main import main
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.reports.inspection import Inspection, render_inspection
from trl_singlepass.reports.pages import inspection_page


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("qwen3_vl")


@pytest.fixture(scope="module")
def inspection(processor):
    samples = example_to_samples({"messages": CHAT}, 0, processor, RowSettings()).samples
    return Inspection.from_samples(samples, processor.tokenizer)


def test_the_terminal_numbers_images_and_shows_each_once(inspection):
    console = Console(width=400, record=True)
    console.print(render_inspection(inspection))
    text = console.export_text()
    assert re.findall(r"\[image \d\]", text) == ["[image 1]", "[image 2]", "[image 1]"]
    assert "<|image_pad|>" not in text


def test_the_page_holds_a_thumbnail_of_each_distinct_image(inspection):
    page = inspection_page(inspection, "screens")
    assert page.count("data:image/png;base64,") == 2
    assert "img-src data:" in page


def test_an_audit_reads_images_and_names_rows_that_it_cannot_read(processor):
    rows = [{"messages": CHAT}, {"messages": [user("Hi."), answer("Hello.")]}, {"messages": CHAT, "images": [b"none"]}]
    report = audit(rows, processor)
    assert report.num_rows == 3
    assert "1 images in its column" in str(report)


def test_inspect_reads_images_of_a_file(tmp_path, capsys):
    in_column([CHAT]).to_parquet(tmp_path / "screens.parquet")
    model = save_vision_checkpoint("qwen3_vl", tmp_path / "model")
    assert main(["inspect", model, str(tmp_path / "screens.parquet"), "--html", str(tmp_path / "page.html")]) == 0
    assert "[image 2]" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().count("data:image/png;base64,") == 2
