"""Pages in headless Chromium: keys move, dialogs open and close, and nothing is wider than a narrow window."""

import shutil

import pytest

from support.chat_tokenizers import make_tokenizer
from support.conversations import TOOLS, chat, tool_chat
from trl_singlepass import audit
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.inspection import Inspection
from trl_singlepass.reports.pages import audit_page, inspection_page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium-headless-shell)")
WIDE, NARROW = {"width": 1300, "height": 900}, {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("pages"), make_tokenizer()
    long_word = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y" * 300}]
    chats = {"chat": chat(12), "tools": tool_chat(), "word": long_word}
    for name, messages in chats.items():
        samples = render_example({"messages": messages, "tools": TOOLS}, tokenizer)
        inspection = Inspection.from_samples(samples, tokenizer)
        (folder / f"{name}.html").write_text(inspection_page(inspection, f"a {'long ' * 20}title"), "utf-8")
    report = audit([{"messages": messages} for messages in chats.values()], tokenizer)
    (folder / "audit.html").write_text(audit_page(report, "audit"), "utf-8")
    return folder


@pytest.fixture
def visit(browser, pages):
    opened, problems = [], []

    def visit(name, size=WIDE, anchor=""):
        page = browser.new_page(viewport=size)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
        page.goto((pages / name).as_uri() + anchor)
        opened.append(page)
        return page

    yield visit
    for page in opened:
        page.close()
    assert problems == []


@pytest.mark.parametrize("name", ["chat.html", "tools.html", "word.html", "audit.html"])
def test_nothing_is_wider_than_a_narrow_window(visit, name):
    page = visit(name, NARROW)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_whole_tree_is_in_sight(visit, size):
    page = visit("chat.html", size)
    boxes = [bar.bounding_box() for bar in page.locator("#tree rect, #tree .label").all()]
    assert len(boxes) > page.evaluate("data.lanes.length + data.turns.length")
    for box in boxes:
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_arrow_keys_go_from_token_to_token(visit, size):
    page = visit("chat.html", size)
    while page.evaluate("document.activeElement.id") != "tokens":
        page.keyboard.press("Tab")
    texts = page.evaluate("data.text")
    for key, position in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", len(texts) - 1),
        ("Home", 0),
    ):
        page.keyboard.press(key)
        assert page.locator(".now").get_attribute("data-position") == str(position)
        assert f"{position} of {len(texts)}" in page.locator("#token").inner_text()
        box, panel = page.locator(".now").bounding_box(), page.locator(".token-panel").bounding_box()
        assert 0 <= box["y"] < size["height"]
        if size is NARROW:
            assert box["y"] + box["height"] <= panel["y"] + 1, "the panel covers the token"


def test_turns_open_and_close_with_keys(visit):
    page = visit("chat.html")
    page.get_by_role("button", name="Turn 2", exact=True).focus()
    page.keyboard.press("Enter")
    title = page.locator("#sample-title")
    assert title.inner_text().startswith("Turn 2:")
    page.keyboard.press("ArrowRight")
    assert title.inner_text().startswith("Turn 3:")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert title.inner_text().startswith("Turn 1:")
    assert (
        page.evaluate("data.turns[0].path.reduce((n, [a, b]) => n + b - a, 0)")
        == page.locator("#sample-text .token").count()
    )
    page.keyboard.press("Escape")
    assert not page.locator("#sample").is_visible()
    assert page.evaluate("document.activeElement.textContent") == "Turn 2"


def test_the_mask_is_painted_with_what_the_tree_allows(visit):
    page = visit("chat.html")
    wrong = page.evaluate(
        """() => {
            const size = byId("mask").width;
            const at = Array.from({ length: size }, (_, p) => Math.floor((p + 0.5) * length / size));
            let wrong = 0;
            for (let y = 0; y < size; y++) for (let x = 0; x < size; x++) {
                const white = maskImage.data.slice(4 * (y * size + x), 4 * (y * size + x) + 3).every((c) => c === 255);
                wrong += white === (at[x] <= at[y] && at[y] < data.end[at[x]]);
            }
            return wrong;
        }"""
    )
    assert wrong == 0
