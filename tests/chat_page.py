"""In: a Browser with the chat page, and its service. Out: what people do there, in tests."""

from __future__ import annotations

import time
from typing import Any

import pytest
from browser import Browser
from small_api import Api

import openlpu

LAST = ".turn.model:last-child"
"""The latest answer."""
IDLE = "document.documentElement.dataset.busy === 'false'"


def say(browser: Browser, words: str) -> None:
    browser.write("#words", words)
    browser.press("Enter")


def choose(browser: Browser, name: str, value: str) -> None:
    """Change a setting."""
    if not browser.run("document.querySelector('#settings').open"):
        browser.click("summary")
    browser.write(f"#{name}", value)


def answer(browser: Browser, words: str) -> str:
    """What the model says to that."""
    turns = browser.run("document.querySelectorAll('.turn.model').length")
    say(browser, words)
    browser.until(f"{IDLE} && document.querySelectorAll('.actions').length === {turns + 1}")
    return browser.text(f"{LAST} .text")


def long_seed(api: Api, words: str, **most: int) -> int:
    """One whose answer does not end by itself."""
    messages = [{"role": "user", "content": words}]
    body = {"model": "tiny", "messages": messages, "temperature": 0.7, "top_p": 0.95, **most}
    for seed in range(100):
        told = api.post("/v1/chat/completions", {**body, "seed": seed}).json()
        if told["choices"][0]["finish_reason"] == "length":
            return seed
    raise AssertionError("no answer is long")


def slowed(model: openlpu.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes its time."""
    step = model.engine.step

    def slow() -> Any:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(model.engine, "step", slow)
