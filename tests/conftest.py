"""In: pytest's session. Out: what every test file shares: the default model, a browser, calm
settings."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker owns one core; without this, numpy and torch would start a thread for each core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
from browser import Browser, chromium

# A shared machine may stall for longer than hypothesis's default deadline of 200 ms.
hypothesis.settings.register_profile("house", deadline=None, print_blob=True)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def smollm2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's file in the cache (LPU_CACHE holds), fetched once where it is missing."""
    from openlpu.load import hub

    # All workers of a session share this folder: the first one fetches, the others wait for it.
    with (tmp_path_factory.getbasetemp().parent / "smollm2.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        return hub.pull("smollm2")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def browser(window: Browser) -> Browser:
    """Chromium with an empty page; for tests that are marked needs_chromium."""
    window.forget()
    return window
