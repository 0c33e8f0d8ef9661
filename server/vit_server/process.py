"""tritonserver as a child process: starts, watches and stops it, and cleans up after it."""

import ctypes
import fcntl
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from . import memory
from .installation import STUB
from .tritonserver import ServerError

# prctl(2)
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_SECONDS = 10
ALONE_SECONDS = 10
CRASH_SECONDS = 3  # for a crashed tritonserver to write its stack trace
UNSENT_SECONDS = 60  # between two messages about traces that cannot be sent


_LOAD_FAILURE = re.compile(
    r"(?:failed to load(?: model)?|Poll failed for model directory) '([^']+)'"
    r"(?: version \d+)?: (.*)"
)

# getopt's error for a flag, which 200 lines of usage follow.
_WRONG_FLAG = re.compile(r"tritonserver: ((?:unrecognized |invalid )?option .*)")

# The first line that tritonserver's signal handler prints, for crashes too (triton_signal.cc).
_SIGNAL = re.compile(r"Signal \((\d+)\) received")

# Two lines for each failed export of traces, and one for each span dropped as the queue is full.
_UNSENT = re.compile(r"(?:\[OTLP HTTP Client\] (?:Session state: )?|BatchSpanProcessor )(.*)")

# Triton's Python backend creates one of these folders in /tmp for each backend it implements
# (python; pytorch, in the embedded server), and leaves it there, empty, if it is killed.
_LEFT = "python_env_*"

# Errors without information: that there is no GPU, and that the process exited.
_NOISE = re.compile("cuda|non-graceful", re.IGNORECASE)


class Crashed(ServerError):
    """tritonserver crashed by a signal while it loaded the models."""


def say(text: str, stream: TextIO | None = None) -> None:
    """Write to standard error or `stream`; ignore errors such as a full disk or a closed pipe."""
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except OSError:
        with suppress(OSError):  # Python would flush again at exit, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class TritonProcess:
    """A running tritonserver.

    `folder` is where it runs: its Python models would import any module that is in there, instead
    of the standard library's. `python_models` is the minimum number of processes for each of them.

    Only this process receives signals: tritonserver runs in its own session, so that Ctrl-C in a
    terminal reaches neither it nor its stubs. If this process is killed, the kernel terminates
    tritonserver, and its stubs exit when they notice.
    """

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        folder: Path,
        python_models: dict[str, int],
        verbose: bool,
    ) -> None:
        self._python_models = python_models
        self.signals: list[float] = []  # when it was told to stop
        self._log: deque[str] = deque(maxlen=1000)
        self._quiet = not verbose  # during startup, failures are reported in one sentence
        self._stubs: dict[int, str] = {}
        self._unsent = -math.inf  # when it was last reported
        for number in STOPS:
            signal.signal(number, self._on_signal)
        self._left: set[Path] = set()
        self._settled = threading.Event()  # it will create no more folders
        # Stubs that outlive tritonserver become children of this process, which kills them.
        _libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        starting = _alone()
        others = set(Path("/tmp").glob(_LEFT))
        self._child = subprocess.Popen(
            command,
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_before_exec,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self._claimer = threading.Thread(target=self._claim, args=(starting, others), daemon=True)
        self._claimer.start()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return bool(self.signals)

    @property
    def hurried(self) -> bool:
        """Whether it was told to stop at once, by a second signal more than 1 s after the first."""
        return bool(self.signals) and self.signals[-1] - self.signals[0] > 1

    def exited(self) -> bool:
        return self._child.poll() is not None

    def ready(self) -> None:
        """Mark startup as complete: from now on show the log and watch the models' processes.

        Raises:
            ServerError: one of these processes has exited already.
        """
        self._settled.set()
        self._stubs = _stubs(self._child.pid)
        running = Counter(self._stubs.values())
        for model, count in self._python_models.items():
            if running[model] < count:
                raise ServerError(f"the process of the model '{model}' has exited")
        self._quiet = False

    def failure(self) -> ServerError:
        """Return, from its log, why it exited while it loaded the models."""
        self._reader.join(timeout=5)
        log = [line.partition(r"\n\nAt:")[0] for line in self._log]  # without Python's traceback
        for line in log:
            if found := _LOAD_FAILURE.search(line):
                return ServerError(f"the model '{found[1]}' failed to load: {_clean(found[2])}")
            if found := _WRONG_FLAG.search(line):
                return ServerError(
                    f"tritonserver: {found[1]}; vit-server -- --help lists its flags"
                )
        log = [line for line in log if line.strip() and not _NOISE.search(line)]
        errors = [line for line in log if re.match(r"E\d{4} ", line)]
        reason = _clean((errors or log or ["it logged no reason"])[-1]).partition(r"\n")[0]
        code = self.stop()
        kind = Crashed if code > 128 and code != 128 + signal.SIGKILL else ServerError
        return kind(f"tritonserver exited with code {code}: {reason}")

    def watch(self, models: Path) -> None:
        """Return when it was told to stop, or has exited.

        Raises:
            ServerError: the process of a model has exited. Triton never restarts it, stays "ready"
                and fails every request, so the server has to stop too. Or the folder `models` is
                gone, and Triton has unloaded all models.
        """
        # Not a blocking waitpid(2): the kernel may deliver a signal to another thread, and Python
        # would run the handler only when the call returns.
        while not self.stopping and not self.exited():
            time.sleep(0.1)
            dead = [pid for pid in self._stubs if not _alive(pid)]
            if dead and not self.stopping and not self.exited():
                model = self._stubs[dead[0]]
                raise ServerError(f"the process of the model '{model}' has exited (pid {dead[0]})")
            if not models.is_dir():
                raise ServerError(f"the server's own folder was removed: {models}")

    def stop(self) -> int:
        """Stop it; return 0, 130 if killed at once, or its code (128 + signal) if it has exited."""
        if not self.exited():
            self._child.terminate()
            deadline = time.monotonic() + EXIT_SECONDS
            while not self.exited() and not self.hurried and time.monotonic() < deadline:
                time.sleep(0.05)
            if self.exited():
                return 0
            # An idle HTTP connection blocks it: Triton waits for the client to disconnect.
            self._child.kill()
            return 130 if self.hurried else 0
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def close(self) -> None:
        """Kill it if it still runs, then remove everything it left behind."""
        self._child.kill()
        self._child.wait()
        self._end_orphans()
        self._reader.join(timeout=5)  # print the rest of its log first
        self._claimer.join()
        for folder in self._left:
            with suppress(OSError):  # not empty, or another user's
                folder.rmdir()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.signals.append(time.monotonic())

    def _claim(self, starting: int | None, others: set[Path]) -> None:
        """Find this tritonserver's folders in /tmp: those created while no other one starts.

        Removing another one's folder would break it.
        """
        if starting is None:
            return
        backends = 2 if "vit" in self._python_models else 1  # implemented by the Python backend
        settled = False
        while len(self._left) < backends and not settled:
            settled = self.exited() or self._settled.is_set()
            self._left = set(Path("/tmp").glob(_LEFT)) - others
            self._settled.wait(0.05)
        os.close(starting)

    def _read_log(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._log.append(line)
            found = _SIGNAL.match(line)
            asked = found and int(found[1]) in (signal.SIGINT, signal.SIGTERM)
            if found and not asked:
                # Its handler allocates memory for the stack trace, which deadlocks if the heap is
                # corrupted, while other threads keep running and reject every request.
                timer = threading.Timer(CRASH_SECONDS, self._child.kill)
                timer.daemon = True
                timer.start()
            if self._quiet or asked:  # a requested stop is not worth a line
                continue
            if unsent := _UNSENT.search(line):
                self._tell_unsent(unsent[1])
            else:
                say(line.rstrip("\n"))

    def _tell_unsent(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._unsent > UNSENT_SECONDS:
            self._unsent = now
            # The log has no space between what failed and the reason.
            reason = re.sub(r"^([\w ]+)\.(?=\S)", r"\1. ", reason)
            say(f"vit-server: traces cannot be sent: {reason}")

    def _end_orphans(self) -> None:
        """Kill the stubs that tritonserver left, which are now children of this process."""
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while pids := [int(pid) for pid in children.read_text().split()]:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _alone() -> int | None:
    """Wait until no other vit-server is starting its tritonserver on this machine.

    Returns:
        The locked file descriptor, to close when this one has created its folders; None on timeout.
    """
    lock = os.open("/tmp", os.O_RDONLY)
    deadline = time.monotonic() + ALONE_SECONDS
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        time.sleep(0.05)
    os.close(lock)
    return None


def _clean(line: str) -> str:
    """Return a log line without its prefix, Triton's prefixes for exceptions, and quotes."""
    line = re.sub(r"^E\d{4} [^\]]*\] ", "", line)
    return re.sub(r"\b(Internal|TritonModelException): ", "", line).strip('"; \n')


def _stubs(triton: int) -> dict[int, str]:
    """Return the model of each Python stub process, by pid."""
    found = {}
    for children in Path(f"/proc/{triton}/task").glob("*/children"):  # of all its threads
        with suppress(OSError):  # a thread or a process that has just exited
            for pid in children.read_text().split():
                # …/triton_python_backend_stub …/preprocess/1/model.py …
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if words[0].endswith(STUB):
                    found[int(pid)] = Path(words[1]).parent.parent.name
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # out of file descriptors: assume so
        return True


def allow_all_files() -> None:
    """Raise the soft limit of open files to the hard limit: each connection takes a descriptor.

    Without a free one Triton could not read its model repository either.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _before_exec() -> None:
    """Runs in the child: have the kernel send SIGTERM when the parent exits for any reason."""
    _libc.prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if memory.limited():
        memory.go_first()
