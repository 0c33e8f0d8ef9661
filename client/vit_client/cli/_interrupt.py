"""The first Ctrl-C ends the command in order (KeyboardInterrupt), the second at once."""

from __future__ import annotations

import os
import signal
import socket
import threading

from ._common import INTERRUPTED


def end_at_second() -> None:
    """From now on a second Ctrl-C ends the process, whatever hangs: a stalled mount, or a thread
    that Python waits for at its own end.

    Python runs signal handlers in the main thread only, which may be what hangs; but it writes
    the number of each signal to a socket at once.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    try:
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    except ValueError:  # not in the main thread: signals are the caller's business
        reader.close()
        writer.close()
        return
    threading.Thread(target=_watch, args=(reader, writer), name="ctrl-c", daemon=True).start()


def _watch(reader: socket.socket, writer: socket.socket) -> None:
    """`writer` is only kept: a socket closes when nothing refers to it."""
    interrupts = 0
    while interrupts < 2:
        interrupts += reader.recv(16).count(signal.SIGINT)
    os._exit(INTERRUPTED)
