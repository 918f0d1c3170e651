"""In: nothing. Out: the processor's and the system's names; how many cores are in use."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

SETTLE_S = 0.25  # threads that spin after their work have gone to sleep by then


def busy_cores(seconds: float) -> float:
    """Sleep; how many of the machine's cores were in use meanwhile (0 where Linux is not)."""
    before = _not_idle_s()
    time.sleep(seconds)
    return max(0.0, (_not_idle_s() - before) / seconds)


def _not_idle_s() -> float:
    """Seconds of all cores since the start of the machine, but those idle or waiting for a disk;
    what a hypervisor took away counts as used."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *rest = (int(t) for t in stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def system_name() -> str:
    """The operating system and its version, without the builder's own suffix."""
    return f"{platform.system()} {platform.release().split('-')[0]}"


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
