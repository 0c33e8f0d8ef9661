"""tritonserver as a child process: started, watched, stopped, and nothing left behind."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType

from .tritonserver import ServerError

# prctl(2)
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


_LOAD_FAILURE = re.compile(
    r"(?:failed to load|Poll failed for model directory) '([^']+)'(?: version \d+)?: (.*)"
)


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
        log = [line.partition(r"\n\nAt:")[0] for line in self._log]  # without Python's traceback
        for line in log:
            if found := _LOAD_FAILURE.search(line):
                return ServerError(f"the model '{found[1]}' failed to load: {_clean(found[2])}")
        # Triton warns that there is no GPU, but as an error.
        told = [line for line in log if re.match(r"E\d{4} |error:", line) and "Cuda" not in line]
        reason = _clean((told or log or ["it said nothing"])[-1])
        return ServerError(f"tritonserver ended with exit code {self._code()}: {reason}")

    def wait(self) -> int:
        """Wait for its end; its exit code as a shell counts it (128 + signal)."""
        # Not in one waitpid(2): the kernel may give a signal to another thread (gRPC has some),
        # and Python runs the handler only when this one comes back.
        while not self.exited():
            time.sleep(0.1)
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


def _clean(line: str) -> str:
    """A line of the log without its prefix and quotes."""
    return re.sub(r"^E\d{4} [^\]]*\] ", "", line).strip('" \n')


def _die_with_parent() -> None:
    """In the child, before exec: the kernel sends SIGTERM when the parent ends, however it ends."""
    _libc.prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
