"""tritonserver as a child process: started, watched, stopped, and nothing left behind."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from types import FrameType

from .tritonserver import ServerError

# prctl(2)
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


class TritonProcess:
    """A running tritonserver.

    Signals go to this process, which passes them on: tritonserver is in a session of its own, so
    that Ctrl-C in a terminal does not also reach its stubs. Should this process be killed, the
    kernel ends tritonserver, and its stubs end when they see that.
    """

    def __init__(self, command: list[str], env: dict[str, str], shm_prefix: str) -> None:
        self.shm_prefix = shm_prefix
        self.stopping = False
        self._log: deque[str] = deque(maxlen=1000)
        self._quiet = True  # while it starts: a failure is told in one sentence instead
        # Stubs that outlive tritonserver become children of this process, which ends them.
        _libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._child = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            text=True,
            errors="replace",
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def exited(self) -> bool:
        return self._child.poll() is not None

    def show_log(self) -> None:
        """From here on tritonserver's log goes to standard error as it comes."""
        self._quiet = False

    def failure(self) -> ServerError:
        """Why it went away, from its log."""
        self._reader.join(timeout=5)
        log = list(self._log)
        for line in log:
            # "failed to load 'vit' version 1: Internal: RuntimeError: …", with the traceback below
            if found := re.search(r"failed to load '(\S+)' version \d+: (.*)", line):
                return ServerError(f"the model '{found[1]}' failed to load: {found[2]}")
        told = [line for line in log if re.match(r"E\d{4} |error:", line)] or log[-1:]
        reason = re.sub(r"^E\d{4} .*?\] ", "", told[-1]).strip('" \n') if told else "it said nothing"
        return ServerError(f"tritonserver ended with exit code {self._code()}: {reason}")

    def wait(self) -> int:
        """Wait for its end; its exit code as a shell counts it (128 + signal)."""
        self._child.wait()
        return self._code()

    def close(self) -> None:
        """End it if it still runs, then everything it left behind."""
        if not self.exited():
            self._child.terminate()
            try:
                self._child.wait(timeout=40)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._end_orphans()
        for segment in Path("/dev/shm").glob(f"{self.shm_prefix}*"):
            segment.unlink(missing_ok=True)

    def _code(self) -> int:
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.stopping = True
        if self._child.poll() is None:
            self._child.send_signal(number)

    def _read_log(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._log.append(line)
            if not self._quiet:
                sys.stderr.write(line)
                sys.stderr.flush()

    def _end_orphans(self) -> None:
        """Kill the stubs that tritonserver left, which the kernel has given to this process."""
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while pids := [int(pid) for pid in children.read_text().split()]:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _die_with_parent() -> None:
    """In the child, before exec: the kernel sends SIGTERM when the parent ends, however it ends."""
    _libc.prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
