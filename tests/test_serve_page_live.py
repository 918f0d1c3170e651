"""In: a small service and Chromium. Out: the page's charts move, its looks suit everybody."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from browser import Browser, needs_chromium
from chat_page import IDLE, LAST, answer, choose, say, slowed
from small_api import Api, roomy_model, serving_api

import openlpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    with roomy_model(tmp_path_factory.mktemp("models")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def api(model: openlpu.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving_api(model, tmp_path_factory.mktemp("data")) as running:
        yield running


# -- the charts -------------------------------------------------------------------------------


@needs_chromium
def test_the_charts_move(
    api: Api, model: openlpu.Model, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(model, monkeypatch)
    browser.open(api.url)
    options = {"max_tokens": 150, "ignore_eos": True}
    busy = [
        threading.Thread(target=api.chat, args=(f"{i} " * 40,), kwargs=options) for i in range(5)
    ]
    for one in busy:
        one.start()
    batch = "Number(document.querySelector('[data-chart=batch] b').textContent)"
    browser.until(f"{batch} === 5")
    browser.until("Number(document.querySelector('[data-chart=out] b').textContent) > 20")
    for name in ("first", "between"):
        browser.until(f"/m?s$/.test(document.querySelector('[data-chart={name}] b').textContent)")
    browser.until("document.querySelector('#kv .held').getBoundingClientRect().width > 0")
    assert "pages free, 64 tokens each" in browser.text("#kv-text") or "no limit" in browser.text(
        "#kv-text"
    )
    for one in busy:
        one.join()
    browser.until(f"{batch} === 0")
    browser.until("Number(document.querySelector('[data-chart=out] b').textContent) === 0")
    # Pointing at a chart tells the past.
    area = browser.run(
        "(() => { const r = document.querySelector('[data-chart=batch] .plot')"
        ".getBoundingClientRect(); return [r.right - 12, r.y + 9]; })()"
    )
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=area[0], y=area[1])
    browser.until("document.querySelector('[data-chart=batch] .note').textContent.endsWith('ago')")
    assert browser.console == []


@needs_chromium
def test_nobody_asks_while_nobody_looks(api: Api, browser: Browser) -> None:
    browser.open(api.url)
    browser.until("document.querySelector('#pulse').dataset.state === 'alive'")
    hide = (
        "Object.defineProperty(document, 'hidden', { configurable: true, value: %s });"
        "document.dispatchEvent(new Event('visibilitychange'));"
    )
    browser.run(hide % "true")
    time.sleep(0.3)
    browser.run("0")  # hears what was asked until now
    for seen in (False, True):
        before = len(browser.requests)
        time.sleep(1.3)
        browser.run("0")
        asked = browser.requests[before:]
        assert 2 <= len(asked) <= 4 if seen else asked == []
        browser.run(hide % "false")
    # On a narrow screen the charts are not seen until they are wanted.
    browser.size(700, 800)
    time.sleep(0.7)
    browser.run("0")
    before = len(browser.requests)
    time.sleep(1.2)
    browser.run("0")
    assert browser.requests[before:] == []
    browser.click("#view")
    browser.until("document.querySelector('#live').offsetParent !== null")
    time.sleep(0.8)
    browser.run("0")
    assert browser.requests[before:]


# -- for everybody ----------------------------------------------------------------------------


@needs_chromium
def test_it_fits_and_is_named(api: Api, browser: Browser) -> None:
    browser.open(api.url)
    choose(browser, "max_tokens", "80")
    answer(browser, "W" * 300)
    browser.run("document.querySelector('#settings').open = true")
    for width, height in ((360, 640), (768, 1024), (1360, 860), (640, 320)):
        browser.size(width, height)
        for _ in range(1 if width > 1000 else 2):
            wide = "document.documentElement.scrollWidth"
            assert browser.run(wide) <= width
            for part in (".log", "#live"):
                over = "n.scrollWidth > n.clientWidth + 1"
                assert not browser.run(
                    f"(() => {{ const n = document.querySelector('{part}'); return {over}; }})()"
                )
            if width <= 1000:
                browser.click("#view")
        height = "document.querySelector('#words').getBoundingClientRect().height"
        assert 35 < browser.run(height) < 60
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    wanted = {"textbox", "button", "spinbutton", "log", "image", "DisclosureTriangle"}
    found = [n for n in nodes if n["role"]["value"] in wanted and not n["ignored"]]
    assert len(found) > 12
    assert [n for n in found if not n["name"]["value"]] == []


_CONTRAST = """
(() => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colours) => {
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => colour
    .map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest(".unseen, noscript")) continue;
    const below = [];
    for (let n = node; n; n = n.parentElement) below.unshift(getComputedStyle(n).backgroundColor);
    const back = light(rgb(below)), front = light(rgb([...below, getComputedStyle(node).color]));
    const ratio = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    if (ratio < 4.5) poor.push(`${node.tagName} ${node.className} ${ratio.toFixed(2)}`);
  }
  return poor;
})()
"""


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read(api: Api, browser: Browser, dark: bool) -> None:
    browser.size(1360, 860, dark=dark)
    browser.open(api.url)
    assert browser.run(_CONTRAST) == []
    choose(browser, "max_tokens", "9")
    browser.run("document.querySelector('#settings').open = true")
    answer(browser, "Hello")
    browser.click(f"{LAST} .actions button:nth-child(2)")
    browser.until("document.querySelector('.verdict.same')")
    browser.run("document.querySelector('#key').hidden = false")
    say(browser, "x" * 3000)
    browser.until("!document.querySelector('#trouble').hidden")
    assert browser.run(_CONTRAST) == []


@needs_chromium
def test_the_keyboard_is_enough(api: Api, browser: Browser) -> None:
    browser.open(api.url)
    browser.until("document.activeElement.id === 'words'")
    browser.ask("Input.insertText", text="one")
    browser.press("Enter", shift=True)
    browser.ask("Input.insertText", text="two")
    assert browser.run("document.querySelector('#words').value") == "one\ntwo"
    assert browser.run("document.querySelectorAll('.turn').length") == 0
    browser.press("Enter")
    browser.until(f"{IDLE} && document.querySelector('.actions')")
    assert browser.text(".turn.user") == "one\ntwo"
    assert "tokens" in browser.text("#said")
