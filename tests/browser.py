"""In: Chromium, if it is installed. Out: Browser: pages that tests open, press, read, photograph.

The browser is asked over a pipe, in the words of its DevTools protocol: nothing must be installed
for it, and a page's own policy holds as it does for people.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

_PATIENCE_S = 30.0
# Chromium reads commands at descriptor 3, and writes at 4.
_START = """
import fcntl, os, sys
asked, told = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(asked, 3)
os.dup2(told, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page."""

    def __init__(self, asked: int, told: int) -> None:
        """asked, told: the two ends of the pipe."""
        self._asked = asked
        self._told = told
        self._rest = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.console: list[str] = []
        """What stood on the console: messages, errors, breaches of the policy."""
        self.requests: list[str] = []
        """What was asked for."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and what came of it."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._asked, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == number:
                assert "error" not in found, found
                result: dict[str, Any] = found["result"]
                return result
            self._note(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._told, 1 << 16)
            assert piece, "the browser has ended"
            self._rest += piece
        one, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(one)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled":
                self.console += [str(a.get("value", a.get("description"))) for a in params["args"]]
            case "Runtime.exceptionThrown":
                self.console.append(json.dumps(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])

    # -- people ---------------------------------------------------------------------------------

    def forget(self) -> None:
        """Begin anew: an empty page, nothing stored, nothing heard."""
        self.run("location.protocol === 'http:' && sessionStorage.clear()")
        self.ask("Page.navigate", url="about:blank")
        self.console.clear()
        self.requests.clear()
        self.size(1360, 860)

    def size(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go there, until the page says that it is ready."""
        self.ask("Page.navigate", url=url)
        self.until("document.documentElement?.dataset.state === 'ready'")

    def run(self, code: str) -> Any:
        """The value of JavaScript."""
        found = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, code: str, patience_s: float = _PATIENCE_S) -> None:
        """Wait until JavaScript gives something true."""
        ends_s = time.monotonic() + patience_s
        while not self.run(f"!!({code})"):
            assert time.monotonic() < ends_s, (code, self.run("document.body.innerText"))
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What is to be read there."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Press the middle of what must be visible, as a mouse does."""
        at = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({ block: 'nearest' });"
            "const r = node.getBoundingClientRect();"
            "return r.width && [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        assert at, f"{selector} is not to be seen"
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": at[0], "y": at[1], "button": "left", "clickCount": 1}
            self.ask("Input.dispatchMouseEvent", type=kind, **where)

    def write(self, selector: str, text: str) -> None:
        """Replace what a field holds by typing."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            self.ask("Input.insertText", text=text)
        else:
            self.press("Delete")

    def press(self, key: str, *, shift: bool = False) -> None:
        codes = {"Enter": (13, "\r"), "Escape": (27, ""), "Delete": (46, ""), "Tab": (9, "")}
        code, text = codes[key]
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **fields)

    def photograph(self, path: Path) -> None:
        """A picture of what is to be seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser whose profile is in the folder."""
    asked, asking = os.pipe()
    telling, told = os.pipe()
    assert CHROMIUM is not None
    words = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder / 'profile'}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", _START, str(asked), str(told), *words],
        pass_fds=(asked, told),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(asked)
    os.close(told)
    try:
        yield Browser(asking, telling)
    finally:
        os.close(asking)
        os.close(telling)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
