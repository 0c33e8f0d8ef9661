"""Processes, sockets and temporary files of a vit-server, as the kernel sees them."""

import ipaddress
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

FREE_PORTS = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")


@contextmanager
def started(command: Any, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed if the test fails; Popen alone would wait for it to exit."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def descendants(pid: int) -> set[int]:
    """All processes below `pid`."""
    children: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):  # any thread may have started one
        children |= set(map(int, _read(thread).split()))
    return children.union(*map(descendants, children))


def _read(file: Path) -> str:
    """A file in /proc; empty if the process has exited meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):  # the latter: during the read
        return file.read_text()
    return ""


def gone(pids: set[int], seconds: float = 20) -> bool:
    """Whether all of these processes exit within that time (a zombie counts as exited)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(map(_alive, pids)):
            return True
        time.sleep(0.1)
    return False


def _alive(pid: int) -> bool:
    state = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].strip()[:1]
    return state not in ("", "Z")


def segments(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"vit_server_{pid}_*"))


def workspaces(pid: int) -> list[Path]:
    return list(Path("/tmp").glob(f"vit-server-{pid}-*"))


def environments() -> set[Path]:
    """What Triton's Python backends create, and leave behind if killed; of all servers."""
    return set(Path("/tmp").glob("python_env_*"))


def model_processes(pid: int, model: str) -> list[int]:
    """The processes of a model, below the vit-server `pid`."""
    return [
        below
        for below in descendants(pid)
        if re.search(rf"/{model}/\d+/", _read(Path(f"/proc/{below}/cmdline")))
    ]


def model_process(pid: int, model: str) -> int:
    """One of them."""
    return min(model_processes(pid, model))


def tritonserver(pid: int) -> int:
    (found,) = (
        below
        for below in descendants(pid)
        if _read(Path(f"/proc/{below}/comm")).strip() == "tritonserver"
    )
    return found


def listening(pid: int) -> set[tuple[int, str]]:
    """Port and address of every listening TCP socket of `pid` and the processes below it."""
    inodes = set()
    for below in {pid, *descendants(pid)}:
        for link in Path(f"/proc/{below}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if found := re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink())):
                    inodes.add(found[1])
    found_sockets = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, _, port = fields[1].rpartition(":")
                # The kernel prints 32-bit words in native byte order.
                words = struct.pack(
                    f"={len(host) // 8}I",
                    *(int(host[i : i + 8], 16) for i in range(0, len(host), 8)),
                )
                address = ipaddress.ip_address(words)
                mapped = getattr(address, "ipv4_mapped", None)
                found_sockets.add((int(port, 16), str(mapped or address)))
    return found_sockets


def with_mounts(script: str) -> list[str]:
    """A wrapper that runs `script` in its own mount namespace, then the command appended to it."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine has no namespaces for users")
    return [*namespace, "sh", "-c", f'{script} && exec "$@"', "sh"]
