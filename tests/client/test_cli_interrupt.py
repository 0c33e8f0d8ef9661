"""Ctrl-C while the command waits for input that never arrives."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import encoded
from .test_cli import COMMAND


@contextmanager
def running(url: str, *command: object) -> "Iterator[subprocess.Popen[str]]":
    """A command whose standard input never ends."""
    with subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, "VIT_URL": url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def opened_for_reading(pipe: Path) -> int:
    """Wait for a reader of `pipe`; returns a descriptor that keeps it open and empty."""
    return os.open(pipe, os.O_WRONLY)


@pytest.mark.parametrize(
    "arguments", [["embed", "--files-from"], ["classify"], ["similar", "--to", "x.npz"],
                  ["features", "--picture", "x.png"], ["embed", "-o", "x.npz"]],
)  # fmt: skip
def test_a_pipe_that_stays_empty(url: str, tmp_path: Path, arguments: list[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = [tmp_path / word if "." in word else word for word in arguments]
    if "similar" in words:
        subprocess.run(
            [COMMAND, "embed", "-", "-o", tmp_path / "x.npz"],
            env={**os.environ, "VIT_URL": url}, input=encoded(0), check=True, timeout=60,
        )  # fmt: skip
    with running(url, COMMAND, *words, pipe) as process:
        writer = opened_for_reading(pipe)
        try:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            os.close(writer)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "Fatal Python error" not in said
    assert "interrupted" in said


@pytest.mark.parametrize(
    "arguments",
    [["classify", "-"], ["embed", "--files-from", "-"], ["features", "-", "--picture", "x.png"]],
)
def test_standard_input_that_never_ends(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with running(url, COMMAND, *arguments) as process:
        assert process.stdin is not None
        process.stdin.write("the beginning")
        process.stdin.flush()
        wait_until_empty(process.stdin.fileno())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "vit-client: interrupted\n"


def wait_until_empty(pipe: int) -> None:
    """Wait until the pipe is drained: then its reader is blocked."""
    for _ in range(600):
        (left,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))
        if not left:
            return
        time.sleep(0.05)
    pytest.fail("nobody reads it")


# Ignores the first Ctrl-C.
HANGS = """
import sys, time
from vit_client.cli import _parser, main
def hang(options):
    while True:
        try:
            print("hanging", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
_parser.health = hang
sys.exit(main(["health"]))
"""


def test_the_second_ends_it_whatever_hangs() -> None:
    with running("localhost:1", sys.executable, "-c", HANGS) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "hanging\n"  # still
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


# Python joins a thread after the command has ended.
HANGS_AT_EXIT = """
import sys, threading, time
from vit_client.cli import _parser, main
def hang(options):
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("hanging", flush=True)
    time.sleep(60)
_parser.health = hang
sys.exit(main(["health"]))
"""


def test_the_second_ends_what_python_waits_for() -> None:
    with running("localhost:1", sys.executable, "-c", HANGS_AT_EXIT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline() == "vit-client: interrupted\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""


def test_a_job_in_the_background_is_left_alone(url: str) -> None:
    """Ctrl-C is not meant for it: a shell without job control makes it ignore SIGINT."""
    ignoring = f"trap '' INT; exec {COMMAND} classify -"
    with running(url, "sh", "-c", ignoring) as process:
        assert process.stdin is not None
        process.stdin.write("no image")
        process.stdin.flush()
        wait_until_empty(process.stdin.fileno())
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert "-: " in said
        assert process.returncode == 1


# The main thread never returns from C, so Python does not run its handlers.
HANGS_IN_C = """
import ctypes, sys
from vit_client.cli import _parser, main
libc = ctypes.CDLL(None)
lock = ctypes.create_string_buffer(256)
def hang(options):
    libc.pthread_mutex_lock(lock)
    while True:
        try:
            print("hanging", flush=True)
            libc.pthread_mutex_lock(lock)
        except KeyboardInterrupt:  # came before it was in there
            pass
_parser.health = hang
sys.exit(main(["health"]))
"""


def test_the_second_ends_a_stalled_main_thread() -> None:
    with running("localhost:1", sys.executable, "-c", HANGS_IN_C) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGINT)
        # A signal sent while the first is pending would be merged with it.
        assert signal_is_taken(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def signal_is_taken(pid: int) -> bool:
    """Wait until no SIGINT is pending."""
    bit = 1 << (signal.SIGINT - 1)
    for _ in range(600):
        status = Path(f"/proc/{pid}/status").read_text()
        pending = (line.split()[1] for line in status.splitlines() if "Pnd:" in line)
        if not any(int(mask, 16) & bit for mask in pending):
            return True
        time.sleep(0.05)
    return False
