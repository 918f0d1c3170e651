"""In: Programs, some with hostile names. Out: the page holds them, works, and runs nothing else.

What needs a browser uses Chromium if it is installed, and is skipped if not.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, needs_chromium
from made_up_program import NO_MAPS, ONE, model

from openlpu.asm import save
from openlpu.chip import load_chip
from openlpu.cli import main
from openlpu.isa import units
from openlpu.program import Issue, Program, Run, Section, Segment
from openlpu.viz.flows import instruction_text
from openlpu.viz.page import page
from openlpu.viz.trace import trace_bytes

TINY = load_chip("tiny")

ATTACKS = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "]]>\"'`${document.title='owned'}&lt;b&gt;\u2028\x00{{data}}",
    "javascript:document.title='owned'",
)


class Reader(HTMLParser):
    """Elements of a page by tag, texts of scripts by id, ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.texts: dict[str, str] = {}
        self.script = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))
        self.script = (dict(attrs).get("id") or "code") if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        self.script = ""

    def handle_data(self, data: str) -> None:
        if self.script:
            self.texts[self.script] = self.texts.get(self.script, "") + data


def hostile() -> Program:
    """Every name in it attacks the page."""
    made = model("tiny")
    sections = tuple(
        replace(s, name=ATTACKS[i], tags=tuple(f"{ATTACKS[i]} {tag}" for tag in s.tags))
        for i, s in enumerate(made.sections)
    )
    image = tuple(replace(s, what=ATTACKS[i % 5]) for i, s in enumerate(made.image))
    used = tuple((ATTACKS[i % 5] + "u", *rest) for i, (_, *rest) in enumerate(made.used))
    ports = tuple(replace(port, name=ATTACKS[i]) for i, port in enumerate(made.ports))
    meta = json.dumps({"model": ATTACKS[0] + ATTACKS[1]})
    return replace(made, sections=sections, image=image, used=used, ports=ports, meta=meta)


def driven(text: str, script: str) -> str:
    """The page with a script that acts on it once it is ready; its policy would not allow one."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    end = 'document.documentElement.dataset.state = "ready";'
    assert end in text
    return text.replace(end, f"{end}\n{script}")


def opened(text: str, folder: Path) -> tuple[Reader, str]:
    """The page as Chromium leaves it, and what stood on its console."""
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,2400",
            "--virtual-time-budget=8000",
            "--enable-logging=stderr",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Reader(done.stdout), "\n".join(console)


def unpacked(reader: Reader) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The data, its tables, and the texts of instructions."""
    data = json.loads(reader.texts["data"])
    raw = zlib.decompress(base64.b64decode(reader.texts["blob"]))
    at, tables = 0, {}
    for name, spec in data["tables"].items():
        shape = (len(spec["columns"]), spec["rows"])
        size = 4 * shape[0] * shape[1]
        values = np.frombuffer(raw[at : at + size], "<i4").reshape(shape)
        tables[name] = dict(zip(spec["columns"], values, strict=True))
        at += size
    return data, tables, raw[at:].decode().split("\n")


# -- what is in the file ----------------------------------------------------------------------


def test_the_page_asks_for_nothing() -> None:
    text = page(model(), load_chip("tsp_v1"), ONE)
    assert text == page(model(), load_chip("tsp_v1"), ONE)
    reader = Reader(text)
    for tag, all_attributes in reader.tags.items():
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        for attributes in all_attributes:
            assert not {"src", "href", "srcset"} & set(attributes)
            assert not any(name.startswith("on") for name in attributes)
    assert not re.search(
        r"https?:|@import|url\(|\bfetch\(|XMLHttp|\bimport\b|innerHTML|\beval\b", text
    )
    policy = reader.tags["meta"][1]["content"] or ""
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(text) < 200_000


def test_the_page_holds_every_issue() -> None:
    made = model("tiny")
    data, tables, texts = unpacked(Reader(page(made, TINY, ONE)))
    bursts = tables["bursts"]
    for section, told in zip(made.sections, data["sections"], strict=True):
        assert told["bursts"] == len(section.issues)
        for i, issue in enumerate(section.issues, told["first"]):
            assert bursts["queue"][i] == issue.queue
            assert data["ops"][bursts["op"][i]] == issue.op
            assert told["tags"][bursts["tag"][i]] == section.tags[issue.tag]
            assert (bursts["cycle"][i], bursts["count"][i]) == (issue.cycle, issue.count)
            assert texts[bursts["text"][i]] == instruction_text(issue)
        assert {o["tag"] for o in told["operations"]} == {i.tag for i in section.issues}
    held = int(tables["words"]["words"].sum()) * TINY.lanes
    assert held == data["memory"]["used"] == sum(r["bytes"] for r in data["memory"]["table"])


def test_names_stay_data() -> None:
    made = hostile()
    text = page(made, TINY, ONE)
    reader = Reader(text)
    assert len(reader.tags["script"]) == 3
    assert "img" not in reader.tags
    data, _, _ = unpacked(reader)
    assert [s["name"] for s in data["sections"]] == list(ATTACKS)
    assert data["sections"][0]["tags"] == list(made.sections[0].tags)


@pytest.mark.parametrize("meta", ["", "[1]", "{}", '{"model": 3}', "[" * 100_000, '{"model": " "}'])
def test_a_program_needs_no_name(meta: str) -> None:
    made = replace(model("tiny"), meta=meta)
    assert "<title>LPU program</title>" in page(made, TINY, ONE)


def test_the_title_is_the_name_that_was_compiled() -> None:
    made = replace(model("tiny"), meta='{"model": "llama", "checkpoint": "smollm2"}')
    assert "<title>smollm2</title>" in page(made, TINY, ONE)


# -- in a browser -----------------------------------------------------------------------------


@needs_chromium
def test_the_page_opens(tmp_path: Path) -> None:
    reader, console = opened(page(model(), load_chip("tsp_v1"), ONE), tmp_path)
    assert console == ""
    assert reader.tags["html"][0]["data-state"] == "ready"
    assert len(reader.tags["option"]) == 5
    chosen = [b for b in reader.tags["button"] if "data-section" in b]
    assert [b["data-section"] for b in chosen] == ["0", "1", "2", "3", "4"]
    # Sections, the step; eight operations of the longest section; kinds of memory, their sum.
    rows = reader.tags["tr"]
    assert sum("data-section" in r for r in rows) == 5
    assert sum("data-tag" in r for r in rows) == 8
    for canvas in reader.tags["canvas"]:
        assert int(canvas["width"] or 0) > 800


@needs_chromium
@pytest.mark.parametrize("sections", [(), (Section("nothing", 0, ()), Section("idle", 9, ()))])
def test_an_empty_program_opens(sections: tuple[Section, ...], tmp_path: Path) -> None:
    plan = tuple(Run(i) for i in range(len(sections)))
    made = Program("tiny", sections, plan, (), NO_MAPS, (), ())
    script = """
    for (let s = 0; s < data.sections.length; s += 1) { choose(s); timeline.paint(); }
    timeline.node.dispatchEvent(new KeyboardEvent("keydown", { key: "+" }));
    document.querySelectorAll("button").forEach((button) => button.click());
    """
    reader, console = opened(driven(page(made, TINY, {}), script), tmp_path)
    assert console == ""
    assert reader.tags["html"][0]["data-state"] == "ready"


@needs_chromium
def test_names_run_nothing(tmp_path: Path) -> None:
    # Every tooltip that can be had is shown, which puts names into the page once more.
    script = """
    for (let s = 0; s < data.sections.length; s += 1) {
      choose(s);
      await new Promise((done) => setTimeout(done, 40));
      for (const group of timeline.groups) for (const lane of group.lanes) {
        const item = lane.items[0], event = new PointerEvent("pointermove");
        if (item) tip.show(event, ...timeline.tell({ group, lane, item }, 0));
      }
    }
    floorplan.hits.forEach((hit) => tip.show(new PointerEvent("pointermove"), ...hit.tell(hit.y)));
    await new Promise((done) => setTimeout(done, 200));
    document.documentElement.dataset.title = document.title;
    """
    text = page(hostile(), TINY, ONE)
    for version in (text, driven(text, script)):
        reader, console = opened(version, tmp_path)
        assert console == ""
        assert reader.tags["html"][0]["data-state"] == "ready"
        assert "img" not in reader.tags
        assert len(reader.tags["script"]) == 3
    assert (reader.tags["html"][0]["data-title"] or "").startswith("</script>")


@needs_chromium
def test_the_timeline_answers(tmp_path: Path) -> None:
    script = """
    const wait = () => new Promise((done) => setTimeout(done, 60));
    const canvas = find("#timeline canvas"), told = {};
    const at = (x, y, more) => {
      const area = canvas.getBoundingClientRect();
      const place = { clientX: area.left + x, clientY: area.top + y };
      return { ...place, cancelable: true, pointerId: 1, ...more };
    };
    choose(3);
    await wait();
    canvas.dispatchEvent(new WheelEvent("wheel", at(700, 100, { deltaY: -400 })));
    await wait();
    told.zoomed = [timeline.from, timeline.to, find("#window").textContent];
    timeline.canvas.setPointerCapture = () => {};
    canvas.dispatchEvent(new PointerEvent("pointerdown", at(700, 100)));
    canvas.dispatchEvent(new PointerEvent("pointermove", at(600, 100)));
    canvas.dispatchEvent(new PointerEvent("pointerup", at(600, 100)));
    await wait();
    told.dragged = [timeline.from, timeline.to];
    canvas.dispatchEvent(new MouseEvent("dblclick", at(600, 100)));
    await wait();
    told.fitted = [timeline.from, timeline.to];
    const group = timeline.groups.find((g) => g.name === "MXM"), item = group.lanes[0].items[0];
    const spot = [timeline.x(item.start + 0.5), group.rows + 4];
    canvas.dispatchEvent(new PointerEvent("pointermove", at(...spot)));
    told.tip = find("#tip").innerText;
    canvas.dispatchEvent(new PointerEvent("pointerdown", at(...spot)));
    canvas.dispatchEvent(new PointerEvent("pointerup", at(...spot)));
    told.kept = timeline.section.tags[timeline.kept];
    told.pressed = document.querySelectorAll('#operations-legend [aria-pressed="true"]').length;
    const before = timeline.height;
    for (const button of document.querySelectorAll(".gutter button")) {
      if (button.textContent === "MEM west reads") button.click();
    }
    await wait();
    told.grown = timeline.height - before;
    find("#timeline").dispatchEvent(new KeyboardEvent("keydown", { key: "+" }));
    told.keyed = timeline.to - timeline.from;
    const plan = find("#floorplan").getBoundingClientRect();
    const inside = { clientX: plan.left + 400, clientY: plan.top + 200 };
    find("#floorplan").dispatchEvent(new PointerEvent("pointermove", inside));
    told.slice = find("#tip").innerText;
    document.documentElement.dataset.told = JSON.stringify(told);
    """
    made = model()
    reader, console = opened(driven(page(made, load_chip("tsp_v1"), ONE), script), tmp_path)
    assert console == ""
    told = json.loads(reader.tags["html"][0]["data-told"] or "")
    total = made.sections[3].cycles
    low, high, words = told["zoomed"]
    assert 0 < low < high < total
    assert words.startswith("cycles ")
    assert told["dragged"][0] > low
    assert told["dragged"][1] - told["dragged"][0] == pytest.approx(high - low)
    assert told["fitted"] == [0, total]
    for part in ("l.ffn.gate_up mxm", "load group=0 step=1", "mxm0.load", "20, one a cycle"):
        assert part in told["tip"]
    assert (told["kept"], told["pressed"]) == ("l.ffn.gate_up mxm", 1)
    assert told["grown"] > 500
    assert told["keyed"] < total
    assert "MEM slice w" in told["slice"]
    assert "weights" in told["slice"]


@needs_chromium
def test_a_page_of_fifty_thousand_bursts_is_drawn_in_time(tmp_path: Path) -> None:
    queues = units(TINY).load
    issues = tuple(
        Issue(c, q, "read", (0, 0, 0, 0), tag=c % 40)
        for q in range(queues)
        for c in range(0, 3200, 2)
    )
    made = Program(
        "tiny",
        (Section("full", 4000, issues, tuple(f"op{i} x" for i in range(40))),),
        (Run(0),),
        (),
        NO_MAPS,
        (Segment(0, 0, np.zeros((3, 32), np.uint8), "weights"),),
        (),
    )
    assert len(issues) > 50_000
    # The browser's own clock stands still here, so the test looks at the one on the wall; reading
    # a pixel back makes sure that everything was drawn.
    script = """
    const pen = timeline.canvas.getContext("2d", { willReadFrequently: true });
    for (let i = 0; i < 20; i += 1) { timeline.paint(); pen.getImageData(200, 100, 1, 1); }
    document.documentElement.dataset.painted = "20";
    """
    text = driven(page(made, TINY, {}), script)
    began_s = time.monotonic()
    reader, _ = opened(text, tmp_path)
    assert reader.tags["html"][0]["data-painted"] == "20"
    # A tenth of this on an idle machine; no frame may take as long as a person notices.
    assert time.monotonic() - began_s < 20


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "made_up.lpu"
    save(model("tiny"), path)
    return path


def lpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lpu", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), "utf-8"))
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_view_and_trace_write_files(
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lpu(capsys, monkeypatch, "view", file) == (0, f"{file.with_suffix('.html')}\n", "")
    assert file.with_suffix(".html").read_text() == page(model("tiny"), TINY, ONE)
    params = ("--params", "chunks=1,2,3,4,5,6,7,8")
    for name in ("t.json", "t.json.gz"):
        target = tmp_path / name
        assert lpu(capsys, monkeypatch, "trace", file, "-o", target, *params)[0] == 0
        values = {"chunks": tuple(range(1, 9))}
        packed = name.endswith(".gz")
        assert target.read_bytes() == trace_bytes(model("tiny"), TINY, values, packed=packed)
    code, out, _ = lpu(capsys, monkeypatch, "view", file, "-o", tmp_path / "p.html", "--json")
    told = json.loads(out)
    assert (code, told["bytes"]) == (0, (tmp_path / "p.html").stat().st_size)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--params", "chunks"), "give NAME=N"),
        (("--params", "rows=1"), "parameters are: chunks"),
        (("--params", "chunks=one"), "whole numbers"),
        (("--params", "chunks=1,2"), "takes 8 values"),
        (("--params", "chunks=27"), "not 0 to 26"),
        (("--chip", "tsp_v1"), "for the chip 'tiny'"),
        (("--chip", "nothing"), "no chip 'nothing'"),
        (("-o", "/nowhere/page.html"), "/nowhere/page.html: no such file or directory"),
        (("-o", "/dev/full"), "/dev/full: no space left on device"),
    ],
)
def test_bad_words_are_one_line(
    file: Path,
    words: tuple[str, ...],
    part: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for command in (("view",), ("trace", "-o", file.with_name("never.json"))):
        code, out, err = lpu(capsys, monkeypatch, *command, file, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert part in err
    assert not file.with_name("never.json").exists()


def test_a_bad_file_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = file.with_name("damaged.lpu")
    damaged.write_bytes(file.read_bytes()[:-1])
    before = file.read_bytes()
    for words in (
        ("view", damaged),
        ("view", file.with_name("none.lpu")),
        ("view", file, "-o", file),
    ):
        code, out, err = lpu(capsys, monkeypatch, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert file.read_bytes() == before
