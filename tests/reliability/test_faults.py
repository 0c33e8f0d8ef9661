"""What breaks is found out within seconds, and never answered wrongly.

vit-server ends with exit code 1 and a sentence, for its supervisor to start it again; callers of
the SDK see an error that says whether to try again, or none where there is another server.
"""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BIN, PHOTOS, Array, Server, serving
from PIL import Image
from processes import FREE_PORTS, descendants, gone, model_process, segments, tritonserver
from torch import Tensor
from vit_client import AsyncClient, Client, Overloaded, VitClientError

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
MODELS = ("preprocess", "vit", "postprocess")


@pytest.fixture(scope="module")
def embedding(tiny_server: Server) -> Array:
    with Client(tiny_server.url) as client:
        return client.embed(PHOTO)


async def kill_under_load(url: str, pid: int, right: Array) -> tuple[Counter[str], float]:
    """What callers see while the process `pid` is killed, and the seconds until all had an answer.

    Every call is one of these: answered rightly, or an error by its name.
    """
    outcomes: Counter[str] = Counter()
    killed = 0.0

    async def ask(client: AsyncClient) -> None:
        while True:
            try:
                answer = await client.embed([PHOTO] * 4)
                wrong = np.abs(answer - right).max() > 1e-4
                outcome = "WRONG" if wrong else "answered"
            except VitClientError as error:
                outcome = type(error).__name__ + (
                    " (retryable)" if error.retryable else f": {error}"
                )
            outcomes[outcome] += 1
            if killed and time.monotonic() > killed + 2:
                return
            await asyncio.sleep(0 if outcome == "answered" else 0.1)

    async with AsyncClient(url, retries=2, timeout=30) as client:
        asking = [asyncio.ensure_future(ask(client)) for _ in range(16)]
        while outcomes["answered"] < 20:
            await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.gather(*asking)
        return outcomes, time.monotonic() - killed


@pytest.mark.parametrize("victim", [*MODELS, "tritonserver", "vit-server"])
def test_a_killed_process(tiny_repository: Path, embedding: Array, victim: str) -> None:
    with serving(tiny_repository, errors=True) as server:
        main = server.process.pid
        pids = descendants(main)
        pid = main if victim == "vit-server" else tritonserver(main)
        if victim in MODELS:
            pid = model_process(main, victim)
        outcomes, seconds = asyncio.run(kill_under_load(server.url, pid, embedding))
        print(victim, dict(outcomes), f"{seconds:.1f} s")
        assert set(outcomes) == {"answered", "Unavailable (retryable)"}
        assert seconds < 35
        code = server.process.wait(60)
        assert code == {"tritonserver": 137, "vit-server": -9}.get(victim, 1)
        if victim in MODELS:
            assert server.process.stderr is not None
            said = server.process.stderr.read().splitlines()[-1]
            assert said == f"vit-server: the process of the model '{victim}' has ended (pid {pid})"
        assert gone(pids, seconds=45)
        if victim != "vit-server":
            assert not segments(main)


def test_a_crash_that_hangs(tiny_repository: Path) -> None:
    """As where the heap is broken: tritonserver's own handler waits for memory, for ever."""
    with serving(tiny_repository, errors=True) as server:
        assert server.process.stderr is not None
        pids, triton = descendants(server.process.pid), tritonserver(server.process.pid)
        os.kill(triton, signal.SIGABRT)
        for line in server.process.stderr:
            if line.startswith("Signal (6)"):
                os.kill(triton, signal.SIGSTOP)  # in its handler
                break
        assert server.process.wait(20) == 1
        said = server.process.stderr.read().splitlines()[-1]
        assert said == "vit-server: tritonserver has crashed and does not end"
        assert gone(pids, seconds=45)
        assert not segments(server.process.pid)


def cut_model(repository: Path) -> None:
    model = repository / "vit" / "1" / "model.pt"
    model.write_bytes(model.read_bytes()[:-1000])


def swapped_model(repository: Path) -> None:
    """One byte of one weight is another."""
    model = repository / "vit" / "1" / "model.pt"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)


def no_labels(repository: Path) -> None:
    (repository / "postprocess" / "1" / "labels.txt").unlink()


def short_labels(repository: Path) -> None:
    labels = repository / "postprocess" / "1" / "labels.txt"
    labels.write_bytes(b"".join(labels.read_bytes().splitlines(True)[:-1]))


def exchanged_labels(repository: Path) -> None:
    """As many as there should be, in another order: every answer would have a wrong name."""
    labels = repository / "postprocess" / "1" / "labels.txt"
    labels.write_bytes(b"".join(reversed(labels.read_bytes().splitlines(True))))


DAMAGE = [cut_model, swapped_model, no_labels, short_labels, exchanged_labels]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_not_served(
    tiny_repository: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(tiny_repository, repository)
    damage(repository)
    command = [BIN / "vit-server", "--model-repository", repository, *FREE_PORTS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    name = "vit/1/model.pt" if "model" in damage.__name__ else "postprocess/1/labels.txt"
    assert name in result.stderr
    assert "is not the file that was built" in result.stderr or "no postprocess" in result.stderr


def test_damage_while_it_serves_changes_no_answer(tiny_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(tiny_repository, repository)
    with serving(repository) as server, Client(server.url, retries=0) as client:
        before = client.classify(PHOTO, top_k=12)
        for damage in DAMAGE[:2] + DAMAGE[3:] + DAMAGE[2:3]:
            damage(repository)
            time.sleep(1.5)  # Triton looks once a second
            assert client.classify(PHOTO, top_k=12) == before
        shutil.rmtree(repository)
        time.sleep(1.5)
        assert client.classify(PHOTO, top_k=12) == before


def small_shm(megabytes: int) -> list[str]:
    """A command that runs another with a /dev/shm of its own."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine has no namespaces for users")
    script = f'mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm && exec "$@"'
    return [*namespace, "sh", "-c", script, "sh"]


def test_dev_shm_too_small_to_start(tiny_repository: Path) -> None:
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    result = subprocess.run(
        [*small_shm(64), *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]
    assert "failed to load" in said
    assert "shared memory" in said
    assert "No space left on device" in said


def test_dev_shm_fills_up(tiny_repository: Path, embedding: Array) -> None:
    """What Triton needs for usual requests it has taken beforehand."""
    too_large = b"P6 7000 7000 255\n" + bytes(3 * 7000 * 7000)  # 147 MB, of 64 there are
    with serving(tiny_repository, under=small_shm(270)) as server:
        shm = Path(f"/proc/{server.process.pid}/root/dev/shm")
        with (shm / "fill").open("wb") as fill, contextlib.suppress(OSError):
            while True:
                fill.write(bytes(1 << 16))
                fill.flush()
        with Client(server.url, retries=0, timeout=60) as client:
            assert np.abs(client.embed(PHOTO) - embedding).max() < 1e-4
            with pytest.raises(Overloaded, match="shared memory"):
                client.embed(too_large)
            assert np.abs(client.embed([PHOTO] * 16) - embedding).max() < 1e-4


@contextlib.contextmanager
def memory_limit(pids: set[int], megabytes: int) -> Iterator[None]:
    """From here on these processes get that much more memory, together."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()  # version 1
    group = (root / "memory" if first else root) / f"vit-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if first else "memory.max")
        limit.write_text(str(megabytes << 20))
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
    except OSError as e:
        pytest.skip(f"this machine lets us limit no memory: {e}")
    try:
        yield
    finally:
        deadline = time.monotonic() + 30
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def test_memory_limit(tiny_repository: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(file, "JPEG")  # small, until it is decoded
    with serving(tiny_repository) as server:
        pids = descendants(server.process.pid)
        with memory_limit({server.process.pid, *pids}, 64):
            with Client(server.url, retries=0, timeout=60) as client:
                client.embed(PHOTO)
                with pytest.raises(VitClientError) as caught:
                    client.embed([file.getvalue()] * 8)
            assert caught.value.retryable, caught.value
            # Whichever process the kernel has chosen.
            assert server.process.wait(60) in (1, 137, -9)
            assert gone(pids, seconds=45)


class FailsOnWhite(torch.nn.Module):
    """As a network would whose memory ran out: for some batches."""

    def __init__(self, served: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.served = served

    def forward(
        self, pixels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # typed, for torch.jit.script
        if bool((pixels == 255).flatten(1).all(1).any()):
            raise ValueError("white")
        return self.served(pixels)  # type: ignore[no-any-return]


async def mixed(url: str, right: Array) -> Counter[str]:
    """Outcomes of photos and white images, 16 at a time, so that some share a batch."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")

    async def ask(image: bytes, name: str) -> str:
        try:
            answer = await client.embed(image)
        except VitClientError as error:
            return f"{name}: {type(error).__name__}: {error}"
        return f"{name}: {'right' if np.abs(answer - right).max() < 1e-4 else 'WRONG'}"

    async with AsyncClient(url, retries=0, timeout=30) as client:
        asking = [ask(PHOTO, "photo") for _ in range(48)]
        asking[24:24] = [ask(file.getvalue(), "white") for _ in range(4)]
        return Counter(await asyncio.gather(*asking))


def test_a_batch_that_fails(tiny_repository: Path, tmp_path: Path, embedding: Array) -> None:
    """All that were in it are told; the rest, and all who come later, are answered."""
    repository = tmp_path / "models"
    shutil.copytree(tiny_repository, repository)
    model, report = repository / "vit" / "1" / "model.pt", repository / "build_report.json"
    torch.jit.script(FailsOnWhite(torch.jit.load(model))).save(model)
    facts = json.loads(report.read_text())
    facts["sha256"]["vit/1/model.pt"] = hashlib.sha256(model.read_bytes()).hexdigest()
    report.write_text(json.dumps(facts))
    with serving(repository) as server:
        outcomes = asyncio.run(mixed(server.url, embedding))
        print(outcomes)
        failed = (
            "ServerError: the server failed (INTERNAL: in ensemble 'embed', the network failed: "
            "builtins.ValueError: white)"
        )
        assert set(outcomes) <= {"photo: right", f"photo: {failed}", f"white: {failed}"}
        assert outcomes[f"white: {failed}"] == 4
        assert outcomes["photo: right"] >= 16  # what was in no batch with a white one
        with Client(server.url, retries=0) as client:
            assert np.abs(client.embed([PHOTO] * 16) - embedding).max() < 1e-4
