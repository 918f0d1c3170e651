"""In: environment variables and overrides. Out: typed knobs, clear errors, a page."""

from __future__ import annotations

import house
import pytest

from openlpu import knobs
from openlpu.errors import RequestError


@pytest.fixture(autouse=True)
def no_knob_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for knob in knobs.KNOBS.values():
        monkeypatch.delenv(knob.env, raising=False)


@pytest.mark.parametrize("name", knobs.KNOBS)
def test_unset_and_empty_mean_the_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knob = knobs.KNOBS[name]
    assert knob.value == knob.default
    assert not knob.choices or knob.default in knob.choices
    monkeypatch.setenv(knob.env, "")
    assert knob.value == knob.default


def test_every_variable_is_ours_and_declared_once() -> None:
    variables = [knob.env for knob in knobs.KNOBS.values()]
    assert all(variable.startswith("LPU_") for variable in variables)
    assert len(set(variables)) == len(variables)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("DEBUG", "3", 3),
        ("THREADS", "2", 2),
        ("KERNELS", "avx2", "avx2"),
        ("CACHE", "/some/folder", "/some/folder"),
        ("OFFLINE", "1", True),
        ("OFFLINE", "TRUE", True),
        ("OFFLINE", "0", False),
        ("OFFLINE", "false", False),
    ],
)
def test_text_becomes_the_type(
    name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    knob = knobs.KNOBS[name]
    monkeypatch.setenv(knob.env, text)
    assert knob.value == value
    assert type(knob.value) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DEBUG", "5"),
        ("DEBUG", "loud"),
        ("THREADS", "1.5"),
        ("THREADS", "two"),
        ("KERNELS", "AVX2"),
        ("KERNELS", "sse"),
        ("OFFLINE", "yes"),
    ],
)
def test_bad_text_is_one_line_that_names_the_variable(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    knob = knobs.KNOBS[name]
    monkeypatch.setenv(knob.env, text)
    with pytest.raises(RequestError) as caught:
        _ = knob.value
    message = str(caught.value)
    assert knob.env in message
    assert repr(text) in message
    assert "\n" not in message


def test_an_override_wins_nests_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPU_THREADS", "4")
    with knobs.override(THREADS=1, KERNELS="plain"):
        assert (knobs.THREADS.value, knobs.KERNELS.value) == (1, "plain")
        with knobs.override(THREADS=0):  # a false value is an override too
            assert knobs.THREADS.value == 0
        assert knobs.THREADS.value == 1
    assert (knobs.THREADS.value, knobs.KERNELS.value) == (4, "auto")


def test_an_override_ends_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), knobs.override(DEBUG=4):
        _ = 1 // 0
    assert knobs.DEBUG.value == 0


def test_an_unknown_override_changes_nothing() -> None:
    with pytest.raises(KeyError), knobs.override(DEBUG=4, VOLUME=11):
        pass
    assert knobs.DEBUG.value == 0


def test_the_page_is_the_table() -> None:
    page = (house.REPOSITORY / "docs" / "knobs.md").read_text(encoding="utf-8")
    assert page == knobs.table(), "run `python tests/house.py`"
