"""In: the cache under stress. Out: whole entries or none, and one clear line of error."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlpu import knobs
from openlpu.errors import StoreError
from openlpu.store import Store, default_root


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def fill(store: Store, key: str, data: bytes) -> None:
    with store.create("packed", key) as file:
        file.write_bytes(data)


def files(store: Store) -> list[str]:
    return sorted(p.name for p in store.root.rglob("*") if p.is_file())


def test_an_entry_reads_back_mapped_and_read_only(store: Store) -> None:
    assert store.get("packed", "a") is None
    fill(store, "a", b"abc")
    path = store.get("packed", "a")
    assert path == store.path("packed", "a")
    data = store.map(path)
    assert bytes(data) == b"abc" and not data.flags.writeable
    assert store.entries() == [("packed", "a", 3)]
    fill(store, "a", b"longer")
    assert bytes(data) == b"abc"  # whoever mapped the old entry keeps it
    store.remove("packed", "a")
    store.remove("packed", "a")
    assert store.get("packed", "a") is None and store.entries() == []


def test_an_empty_entry_maps(store: Store) -> None:
    fill(store, "empty", b"")
    assert store.map(store.path("packed", "empty")).shape == (0,)


def test_a_failed_writer_leaves_nothing_and_keeps_the_old_entry(store: Store) -> None:
    fill(store, "a", b"old")
    with pytest.raises(KeyError), store.create("packed", "a") as file:
        file.write_bytes(b"new")
        raise KeyError
    assert store.path("packed", "a").read_bytes() == b"old"
    assert files(store) == ["a"]


@given(st.lists(st.text(max_size=300), min_size=2, max_size=6, unique=True))
def test_any_two_keys_have_two_file_names_inside_their_kind(keys: list[str]) -> None:
    store = Store(Path("/cache"))
    paths = {store.path("packed", key) for key in keys}
    assert len(paths) == len(keys)
    for path in paths:
        assert path.parent == Path("/cache/packed")
        assert len(path.name) <= 200 and not path.name.startswith(".")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_failing_disk_is_one_line_with_the_way_out(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match="LPU_CACHE") as caught:
            fill(store, "a", b"data")
    assert os.strerror(code).lower() in str(caught.value)
    assert str(store.root) in str(caught.value) and "\n" not in str(caught.value)
    assert files(store) == []


def test_a_real_full_disk_is_found_before_the_work(store: Store) -> None:
    with (
        pytest.raises(StoreError, match="LPU_CACHE"),
        store.create("packed", "a", reserve_bytes=1 << 60),
    ):
        pytest.fail("an exbibyte was reserved")
    assert files(store) == []


def test_reserved_bytes_are_there_from_the_start(store: Store) -> None:
    with store.create("packed", "a", reserve_bytes=4096) as file:
        assert file.stat().st_size == 4096
        np.memmap(file, np.uint8, "r+")[:] = 7
    assert bytes(store.map(store.path("packed", "a"))) == b"\7" * 4096


def test_a_file_in_place_of_the_folder_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StoreError, match="LPU_CACHE"):
        fill(Store(tmp_path / "cache"), "a", b"data")
    with pytest.raises(StoreError), Store(tmp_path / "cache").lock("packed", "a"):
        pass


def test_what_a_killed_writer_leaves_is_removed_but_not_what_a_living_one_writes(
    store: Store,
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from openlpu.store import Store\n"
        "with Store(Path(sys.argv[1])).create('packed', 'big') as file:\n"
        "    file.write_bytes(b'half'); print('writing', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout and writer.stdout.readline() == b"writing\n"
        (temporary,) = files(store)
        fill(store, "a", b"1")
        assert temporary in files(store)  # its writer lives
        writer.send_signal(signal.SIGKILL)
    assert store.get("packed", "big") is None and ("packed", "a", 1) in store.entries()
    fill(store, "a", b"2")
    assert files(store) == ["a"]


def _pack_once(root: Path, log: Path) -> None:
    store = Store(root)
    with store.lock("packed", "model"):
        if store.get("packed", "model") is None:
            with log.open("a") as lines:
                lines.write("packed\n")
            with store.create("packed", "model") as file:
                file.write_bytes(b"x" * 100_000)
                time.sleep(0.05)


def test_processes_that_want_one_entry_make_it_once(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_pack_once, args=(store.root, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
    assert log.read_text() == "packed\n"
    assert store.entries() == [("packed", "model", 100_000)]


def _write_often(root: Path, byte: int) -> None:
    for _ in range(25):
        fill(Store(root), "shared", bytes([byte]) * 50_000)


def test_writers_without_a_lock_never_mix_their_bytes(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_often, args=(store.root, b)) for b in (1, 2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        path = store.get("packed", "shared")
        if path:
            data = store.map(path)
            assert len(data) == 50_000 and (data == data[0]).all()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert files(store) == ["shared"]


def test_the_root_is_the_knob_or_the_users_cache_folder() -> None:
    with knobs.override(CACHE="/somewhere/else"):
        assert Store().root == default_root() == Path("/somewhere/else")
    with knobs.override(CACHE=""):
        assert default_root().name == "openlpu"
