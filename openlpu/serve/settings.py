"""In: what the operator chose. Out: Settings, plain data that every part of the service reads."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from pathlib import Path

from openlpu.errors import RequestError
from openlpu.store import Store


def default_data() -> Path:
    """The folder of keys and usage beside the cache's entries. It is not an entry itself: what is
    in it cannot be made again."""
    return Store().root / "service"


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is loaded and served."""

    model: str
    precision: str = "w8"
    threads: int | None = None
    kernels: str | None = None
    context: int | None = None
    aliases: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    most_running: int = 256
    """Requests with an answer under way."""
    most_waiting: int = 1024
    """Requests that wait; one more is refused with 503 and Retry-After."""
    most_connections: int = 4096
    """Open connections; one more is refused with 503 at once."""
    body_bytes: int = 4 << 20
    """Longest body of a request."""
    kv_bytes: int | None = None
    """Limit of the K/V pool; None: a quarter of the machine's memory."""
    head_timeout_s: float = 10.0
    """From a connection's or a request's first byte to the end of its header."""
    body_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    """From a whole request to the last byte of its answer, a client that reads slowly included."""
    keepalive_timeout_s: float = 30.0
    drain_s: float = 30.0
    """How long answers under way may go on after SIGTERM."""
    log_prompts: bool = False
    share_prefixes: bool = True
    speculate: bool = True
    data: Path = field(default_factory=default_data)
    """Folder of the SQLite file."""
    require_keys: bool | None = None
    """None: once any key exists, or if the address is public."""
    any_name: bool = False
    """Whether requests without keys may call the service by any host's name."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise RequestError(f"port {self.port} does not exist; give 0 to 65535, 0 for any")
        for name in ("most_running", "most_waiting", "most_connections", "body_bytes"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("head", "body", "request", "keepalive"):
            if not getattr(self, f"{name}_timeout_s") > 0:
                raise RequestError(f"{name}_timeout_s must be greater than 0")
        if self.kv_bytes is not None and self.kv_bytes < 1:
            raise RequestError("the K/V pool needs memory; give more than 0")


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """The addresses behind a host name, each once. Raises RequestError if there are none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"host {host!r} is no address of a machine: {reason.lower()}") from None
    return list(dict.fromkeys((family, str(where[0])) for family, _, _, _, where in found))


def is_public(host: str) -> bool:
    """Whether other machines may reach what listens on `host`."""
    return not all(
        ipaddress.ip_address(where.partition("%")[0]).is_loopback for _, where in addresses(host, 0)
    )
