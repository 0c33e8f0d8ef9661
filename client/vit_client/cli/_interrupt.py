"""The first Ctrl-C ends the command in order (KeyboardInterrupt), the second at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType

from ._common import INTERRUPTED


def end_at_second() -> None:
    """From now on a second Ctrl-C ends the process, whatever hangs: a stalled mount, or a thread
    that Python waits for at its own end."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # it is not ours; or the shell has it ignored, as for a job in the background
    # Python runs signal handlers in the main thread only, which may be what hangs; but it writes
    # the number of each signal to a socket at once.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, writer), name="ctrl-c", daemon=True).start()
    signal.signal(signal.SIGINT, _first)


def _first(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, lambda *_: None)  # the second is for the thread alone
    raise KeyboardInterrupt


def _watch(reader: socket.socket, writer: socket.socket) -> None:
    """`writer` is only kept: a socket closes when nothing refers to it."""
    interrupts = 0
    while interrupts < 2:
        interrupts += reader.recv(16).count(signal.SIGINT)
    os._exit(INTERRUPTED)
