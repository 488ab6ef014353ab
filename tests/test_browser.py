"""The pages in a real Chromium without a network: every image is decoded and drawn, nothing leaves the window."""

import io

import numpy as np
import pytest
from PIL import Image

from paradigms import data, report
from tests.browser import CHROMIUM, chromium

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)")

# Decoded sizes and places of all images, and how far the page is wider than its window
MEASURE = """Promise.all([...document.images].map(image => image.decode().catch(() => 0))).then(() => ({
  images: [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().toJSON()]),
  wider: document.documentElement.scrollWidth - innerWidth,
  blocks: [...document.querySelectorAll("section > *, section, header, figure, tr, .run")].map(block => {
    const next = block.nextElementSibling, box = block.getBoundingClientRect()
    const beside = next && next.getBoundingClientRect()
    return !beside || beside.top >= box.bottom - 1 || beside.left >= box.right - 1}),
  requests: performance.getEntriesByType("resource").map(entry => entry.name)}))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    digits = data.load("digits")
    rng = np.random.default_rng(0)
    records = []
    for number in range(2):
        history = [{"step": 100 * step, "train/loss": (1 + 0.2 * rng.random(3)) / step, "validation/loss": 2 / step}
                   for step in range(1, 9)]  # fmt: skip
        images = digits.test["x"][:20].reshape(2, 10, 8, 8, 1)
        labels = [f"{label} → 0" for label in digits.test["y"][:10]]
        examples = report.Examples(images, ("clean", "attacked"), labels, "Digits of the test split")
        metrics = {"a rather long name of a metric/accuracy": rng.random(3), "confusion": rng.integers(0, 50, (3, 10, 10))}
        published = {"accuracy": {"mean": 0.9, "std": 0.01, "source": "A paper of many authors, Table 12 (b), its last row"}}
        result = {"experiment": "x", "protocol": "words " * 60, "metrics": metrics, "published": published, "device": "cpu"}
        config = {"rate": number, "path": "a/long/path" * 12, "hidden": [256] * 9}
        histories = {"": [{**row, "validation/loss": None} for row in history], "part": history}
        records.append(report.Record(f"20260101T000000Z-abcdef0{number}", config, histories, result, [examples]))
    one, folder = records[0], tmp_path_factory.mktemp("pages")
    report.html(folder / "one.html", "x", one.config, one.history, one.result, examples=one.examples)
    report.compare(folder / "several.html", "x", records)
    return folder


def look(browser, path, **window):
    """Opens a page; what is wrong with it, and its measures."""
    browser.open(path.as_uri(), **window)
    found = browser.ask(MEASURE)
    asked = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    messages = [browser.said(name) for name in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
    faults = [f"asked for {url[:60]}" for url in asked + found["requests"] if not url.startswith((path.as_uri(), "data:"))]
    faults += [f"console: {message}" for kind in messages for message in kind]
    faults += ["image not decoded" for width, _ in found["images"] if not width]
    faults += ["blocks overlap"] * (not all(found["blocks"])) + ["wider than the window"] * (found["wider"] > 0)
    screen = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L")).astype(int)
    for _, box in found["images"]:
        left, top, right, bottom = (round(box[side]) for side in ("left", "top", "right", "bottom"))
        if np.ptp(screen[top:bottom, left : min(right, screen.shape[1])]) < 100:
            faults.append(f"nothing drawn at {left}, {top}")
    return faults, found, screen


@pytest.mark.parametrize("window", [{"width": 1200}, {"width": 400}, {"width": 1200, "dark": True}], ids=str)
@pytest.mark.parametrize(("name", "images"), [("one", 1 + 1 + 1 + 1), ("several", 1 + 2 + 2 + 2)])
def test_the_page_shows_all_it_has_without_a_network(browser, pages, name, images, window):
    faults, found, screen = look(browser, pages / f"{name}.html", **window)
    assert not faults
    assert len(found["images"]) == images
    assert (screen[0, 0] < 60) == ("dark" in window)


def test_what_is_wrong_with_a_page_is_seen(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        """<body><section><p style="margin-bottom:-40px">a</p><p>b</p></section><div style="width:5000px">wide</div>
        <img src="data:image/png;base64,AAAA"><img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>
        <img width="50" height="50" src="data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=">"""
    )
    faults, _, _ = look(browser, path)
    for part in ("asked for http", "console: ", "not decoded", "blocks overlap", "wider than the window", "nothing drawn"):
        assert any(part in fault for fault in faults), part
