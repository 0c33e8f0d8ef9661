"""tritonserver as a child process: started, watched, stopped, and nothing left behind."""

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
CRASH_SECONDS = 3  # to write its stack trace
UNSENT_SECONDS = 60  # between two lines about traces that cannot be sent


_LOAD_FAILURE = re.compile(
    r"(?:failed to load(?: model)?|Poll failed for model directory) '([^']+)'"
    r"(?: version \d+)?: (.*)"
)

# What getopt says of a flag, before two hundred lines of usage.
_WRONG_FLAG = re.compile(r"tritonserver: ((?:unrecognized |invalid )?option .*)")

# The first line of tritonserver's handler, which is for crashes too (triton_signal.cc).
_SIGNAL = re.compile(r"Signal \((\d+)\) received")

# Two lines for each sending of traces that fails, and one for each span that finds the queue full.
_UNSENT = re.compile(r"(?:\[OTLP HTTP Client\] (?:Session state: )?|BatchSpanProcessor )(.*)")

# Triton's Python backend makes one of these for each backend that it is (python; pytorch, in the
# embedded server), always there, and leaves it, empty, where it is ended before its own end.
_LEFT = "python_env_*"

# Errors that say nothing: that there is no GPU, and that it ended.
_NOISE = re.compile("cuda|non-graceful", re.IGNORECASE)


class Stalled(ServerError):
    """A model's process got no CPU for so long that Triton gave it up: for a second, or for ten
    while it starts. It may do on a second try."""


class Crashed(ServerError):
    """tritonserver ended itself by a signal while it loaded the models."""


def say(text: str, stream: TextIO | None = None) -> None:
    """Write to standard error or `stream`; a full disk, or no reader, is no reason to end."""
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except OSError:
        with suppress(OSError):  # Python tries again at exit, and fails for it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class TritonProcess:
    """A running tritonserver.

    `python_models` says of each in how many processes it runs, at the least.

    Signals go to this process: tritonserver is in a session of its own, so that Ctrl-C in a
    terminal reaches neither it nor its stubs. Should this process be killed, the kernel ends
    tritonserver, and its stubs end when they see that.
    """

    def __init__(
        self, command: list[str], env: dict[str, str], python_models: dict[str, int], verbose: bool
    ) -> None:
        self._python_models = python_models
        self.signals: list[float] = []  # when it was told to stop
        self._log: deque[str] = deque(maxlen=1000)
        self._quiet = not verbose  # while it starts: a failure is told in one sentence instead
        self._stubs: dict[int, str] = {}
        self._unsent = -math.inf  # when it was last told
        for number in STOPS:
            signal.signal(number, self._on_signal)
        self._left: set[Path] = set()
        self._settled = threading.Event()  # no more folders of its own will come
        # Stubs that outlive tritonserver become children of this process, which ends them.
        _libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        starting = _alone()
        others = set(Path("/tmp").glob(_LEFT))
        self._child = subprocess.Popen(
            command,
            env=env,
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
        """Whether it was told to stop at once: again, and not in the same moment."""
        return bool(self.signals) and self.signals[-1] - self.signals[0] > 1

    def exited(self) -> bool:
        return self._child.poll() is not None

    def ready(self) -> None:
        """It has answered: from here on its log is shown, and its models' processes are watched.

        Raises:
            ServerError: one of them has ended since it answered.
        """
        self._quiet = False
        self._settled.set()
        self._stubs = _stubs(self._child.pid)
        running = Counter(self._stubs.values())
        for model, count in self._python_models.items():
            if running[model] < count:
                raise ServerError(f"the process of the model '{model}' has exited")

    def failure(self) -> ServerError:
        """Why it went away while it loaded the models, from its log."""
        self._reader.join(timeout=5)
        log = [line.partition(r"\n\nAt:")[0] for line in self._log]  # without Python's traceback
        for line in log:
            if "interprocess::lock_exception" in line:  # by which Triton's Python backend ends then
                return Stalled("a model's process got no CPU for too long while it started")
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
        """Return when it was told to stop, or has ended.

        Raises:
            ServerError: the process of a model has ended. Triton never starts it again, stays
                "ready" and fails every request, so that is the end of the server too. Or the
                folder `models` is gone, and Triton has unloaded all of them.
        """
        # Not in one waitpid(2): the kernel may give a signal to another thread, and Python runs
        # the handler only when this one comes back.
        while not self.stopping and not self.exited():
            time.sleep(0.1)
            dead = [pid for pid in self._stubs if not _alive(pid)]
            if dead and not self.stopping and not self.exited():
                model = self._stubs[dead[0]]
                raise ServerError(f"the process of the model '{model}' has exited (pid {dead[0]})")
            if not models.is_dir():
                raise ServerError(f"the server's own folder was removed: {models}")

    def stop(self) -> int:
        """End it; the exit code as a shell counts it (128 + signal), 0 where it was asked for."""
        if not self.exited():
            self._child.terminate()
            deadline = time.monotonic() + EXIT_SECONDS
            while not self.exited() and not self.hurried and time.monotonic() < deadline:
                time.sleep(0.05)
            if self.exited():
                return 0
            # An idle HTTP connection keeps it: Triton waits for the client to go.
            self._child.kill()
            return 130 if self.hurried else 0
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def close(self) -> None:
        """End it if it still runs, then everything it left behind."""
        self._child.kill()
        self._child.wait()
        self._end_orphans()
        self._reader.join(timeout=5)  # their last words, before what this process says of it
        self._claimer.join()
        for folder in self._left:
            with suppress(OSError):  # not empty, or another user's
                folder.rmdir()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.signals.append(time.monotonic())

    def _claim(self, starting: int | None, others: set[Path]) -> None:
        """Learn which folders are this tritonserver's: those that come while no other one starts.

        To remove another's would end it.
        """
        if starting is None:
            return
        backends = 2 if "vit" in self._python_models else 1  # that are the Python backend
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
                # Its handler takes memory for the stack trace, which waits for ever where memory
                # was what broke, while other threads go on and refuse every request.
                timer = threading.Timer(CRASH_SECONDS, self._child.kill)
                timer.daemon = True
                timer.start()
            if self._quiet or asked:  # that is no news
                continue
            if unsent := _UNSENT.search(line):
                self._tell_unsent(unsent[1])
            else:
                say(line.rstrip("\n"))

    def _tell_unsent(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._unsent > UNSENT_SECONDS:
            self._unsent = now
            # What failed, and the reason behind it, without a space between.
            reason = re.sub(r"^([\w ]+)\.(?=\S)", r"\1. ", reason)
            say(f"vit-server: traces cannot be sent: {reason}")

    def _end_orphans(self) -> None:
        """Kill the stubs that tritonserver left, which the kernel has given to this process."""
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while pids := [int(pid) for pid in children.read_text().split()]:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _alone() -> int | None:
    """Wait until no other vit-server starts its tritonserver on this machine.

    Returns:
        What to close when this one has made its folders; None where one takes too long.
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
    """A line of the log without its prefix, what Triton says of an exception, and quotes."""
    line = re.sub(r"^E\d{4} [^\]]*\] ", "", line)
    return re.sub(r"\b(Internal|TritonModelException): ", "", line).strip('"; \n')


def _stubs(triton: int) -> dict[int, str]:
    """The processes that Python models run in, and their models."""
    found = {}
    for children in Path(f"/proc/{triton}/task").glob("*/children"):  # of any of its threads
        with suppress(OSError):  # a thread or a process that has just ended
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
    except OSError:  # no file is left to look with
        return True


def allow_all_files() -> None:
    """Each connection takes a file; without any left Triton would also lose sight of its models."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _before_exec() -> None:
    """In the child. The kernel sends SIGTERM when the parent ends, however it ends."""
    _libc.prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if memory.limited():
        memory.go_first()
