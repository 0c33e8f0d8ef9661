"""A model's process that stalls for more than a second: its late response must be discarded.

Triton 2.51 gives up on such a process, and takes its late response for that of the next request.
"""

import itertools
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import built, serving
from processes import model_processes
from tritonclient.utils import InferenceServerException

from . import bombs, poison


@pytest.mark.parametrize("model", ["preprocess", "vit", "postprocess"])
def test_process_that_was_stopped_ends_instead_of_answering(
    tiny_repository: Path, model: str
) -> None:
    """It is stopped before the request reaches it."""
    first, second = (data for _, data in itertools.islice(poison.originals(), 2))
    with serving(tiny_repository) as server:
        server.infer("classify", "image", [first])
        right = server.infer("classify", "image", [second])["scores"]
        held_up = model_processes(server.process.pid, model)
        send(signal.SIGSTOP, held_up)
        with pytest.raises(InferenceServerException, match="is not healthy"):
            server.infer("classify", "image", [first])
        send(signal.SIGCONT, held_up)
        # An error is acceptable, and so is an answer in the moment before the process ends; the
        # result of another image is not.
        with suppress(InferenceServerException):
            got = server.infer("classify", "image", [second])["scores"]
            np.testing.assert_array_equal(got, right)
        assert server.process.wait(20) == 1


def test_process_that_is_stopped_at_work_ends_too(tiny_repository: Path) -> None:
    photo = next(data for name, data in poison.originals() if name == "coffee.jpg")
    slow = dict(bombs.allowed())["50 million pixels.png"]
    with serving(tiny_repository) as server:
        held_up = model_processes(server.process.pid, "preprocess")
        wanted = server.infer("preprocess", "image", [photo])["pixels"]

        def first() -> None:
            with pytest.raises(InferenceServerException, match="is not healthy"):
                server.infer("preprocess", "image", [slow])

        asking = threading.Thread(target=first)
        asking.start()
        time.sleep(0.25)
        send(signal.SIGSTOP, held_up)
        asking.join()
        threading.Timer(0.1, send, (signal.SIGCONT, held_up)).start()
        try:
            got = server.infer("preprocess", "image", [photo])["pixels"]
        except InferenceServerException:
            assert server.process.wait(20) == 1
        else:
            np.testing.assert_array_equal(got, wanted)


BUSY = """
import ctypes
import pathlib
import threading
import time
from model_before import *


class TritonPythonModel(TritonPythonModel):
    def initialize(self, args):
        super().initialize(args)
        threading.Thread(target=self.tell, daemon=True).start()

    def tell(self):
        while self.pulse.signs.thread is None:
            time.sleep(0.1)
        pathlib.Path({told!r}).touch()

    def answer(self, request):
        if pathlib.Path({flag!r}).exists():
            # Keeps Python's lock for 2 s and uses no CPU, like a thread that waits for one.
            ctypes.PyDLL(None).usleep(2_000_000)
        return super().answer(request)
"""


def test_process_whose_threads_wait_for_pythons_lock_goes_on(
    tiny_repository: Path, tmp_path: Path
) -> None:
    """Triton's own heartbeat needs no lock; it distinguishes this process from a stopped one."""
    repository = tmp_path / "models"
    shutil.copytree(tiny_repository, repository)
    model = built(repository, "postprocess", "model.py")
    model.rename(model.with_name("model_before.py"))
    flag, told = tmp_path / "busy", tmp_path / "told"
    model.write_text(BUSY.format(flag=str(flag), told=str(told)))
    photo = next(data for _, data in poison.originals())
    with serving(repository) as server:
        wanted = server.infer("classify", "image", [photo])
        while not told.exists():  # until the heartbeat thread is identified
            time.sleep(0.1)
        flag.touch()
        got = server.infer("classify", "image", [photo])
        for name, array in wanted.items():
            np.testing.assert_array_equal(got[name], array)
        (held_up,) = model_processes(server.process.pid, "postprocess")
        threading.Timer(0.5, send, (signal.SIGSTOP, [held_up])).start()
        with pytest.raises(InferenceServerException, match="is not healthy"):
            server.infer("classify", "image", [photo])
        send(signal.SIGCONT, [held_up])
        assert server.process.wait(20) == 1


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, number)
