"""The first Ctrl-C stops the command cleanly (KeyboardInterrupt), the second at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType

from ._common import INTERRUPTED


def end_at_second() -> None:
    """From now on a second Ctrl-C kills the process, whatever hangs: a stalled mount, or a thread
    that Python joins at exit."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # another handler; or ignored by the shell, as for a background job
    # Python runs signal handlers only in the main thread, which may hang; but it writes the number
    # of each signal to the wakeup socket at once.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, writer), name="ctrl-c", daemon=True).start()
    signal.signal(signal.SIGINT, _first)


def _first(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, lambda *_: None)  # only the thread handles the second
    raise KeyboardInterrupt


def _watch(reader: socket.socket, writer: socket.socket) -> None:
    """Holds `writer` only to keep it open: an unreferenced socket is closed."""
    interrupts = 0
    while interrupts < 2:
        interrupts += reader.recv(16).count(signal.SIGINT)
    os._exit(INTERRUPTED)
