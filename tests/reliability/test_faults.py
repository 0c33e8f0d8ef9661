"""Faults are detected within seconds and never cause wrong results.

vit-server exits with code 1 and one line, so that its supervisor restarts it; callers of the SDK
get an error that says whether it is retryable, or none if there is another server.
"""

import asyncio
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from conftest import BIN, PHOTOS, Array, Server, built, png, serving
from PIL import Image
from processes import (
    FREE_PORTS,
    descendants,
    gone,
    model_process,
    segments,
    tritonserver,
    with_mounts,
)
from torch import Tensor
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from vit_client import AsyncClient, Client, Overloaded, VitClientError

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
MODELS = ("preprocess", "vit", "postprocess")


Known = tuple[list[bytes], Array]  # images, and the embedding of each


@pytest.fixture(scope="module")
def known(tiny_server: Server) -> Known:
    """Distinct results, so that the result of another image is detected as wrong."""
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(12)]
    with Client(tiny_server.url) as client:
        right = client.embed(images)
    assert min(abs(a - b).max() for a, b in itertools.combinations(right, 2)) > 0.01
    return images, right


def same(answer: Array, right: Array) -> bool:
    return bool(np.abs(answer - right).max() < 1e-4)


async def kill_under_load(url: str, pid: int, known: Known) -> tuple[Counter[str], float]:
    """Kill the process `pid` under load; outcomes, and seconds until all calls had ended.

    The outcome of a call is "right", or the name of its error.
    """
    outcomes: Counter[str] = Counter()
    killed = 0.0

    images, right = known

    async def ask(client: AsyncClient) -> None:
        while True:
            four = random.sample(range(len(images)), 4)
            try:
                answer = await client.embed([images[i] for i in four])
                outcome = "answered" if same(answer, right[four]) else "WRONG"
            except VitClientError as error:
                outcome = type(error).__name__ + (
                    " (retryable)" if error.retryable else f": {error.message}"
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
def test_a_killed_process(tiny_repository: Path, known: Known, victim: str) -> None:
    with serving(tiny_repository, errors=True) as server:
        main = server.process.pid
        pids = descendants(main)
        pid = main if victim == "vit-server" else tritonserver(main)
        if victim in MODELS:
            pid = model_process(main, victim)
        outcomes, seconds = asyncio.run(kill_under_load(server.url, pid, known))
        print(victim, dict(outcomes), f"{seconds:.1f} s")
        assert set(outcomes) == {"answered", "Unavailable (retryable)"}
        assert seconds < 35
        code = server.process.wait(60)
        assert code == {"tritonserver": 137, "vit-server": -9}.get(victim, 1)
        assert server.process.stderr is not None
        said = server.process.stderr.read().splitlines()[-1]
        if victim in MODELS:
            assert said == f"vit-server: the process of the model '{victim}' has exited (pid {pid})"
        if victim == "tritonserver":
            assert said == "vit-server: tritonserver exited with code 137"
        assert gone(pids, seconds=45)
        if victim != "vit-server":
            assert not segments(main)


def test_a_crash_that_hangs(tiny_repository: Path) -> None:
    """As with a corrupt heap: tritonserver's own signal handler blocks in malloc forever."""
    with serving(tiny_repository, errors=True) as server:
        assert server.process.stderr is not None
        pids, triton = descendants(server.process.pid), tritonserver(server.process.pid)
        os.kill(triton, signal.SIGABRT)
        for line in server.process.stderr:
            if line.startswith("Signal (6)"):
                os.kill(triton, signal.SIGSTOP)  # as if in its handler
                break
        assert server.process.wait(20) == 137
        said = server.process.stderr.read().splitlines()[-1]
        assert said == "vit-server: tritonserver exited with code 137"
        assert gone(pids, seconds=45)
        assert not segments(server.process.pid)


def cut_model(repository: Path) -> None:
    model = built(repository, "vit", "model.pt")
    model.write_bytes(model.read_bytes()[:-1000])


def swapped_model(repository: Path) -> None:
    """Change one byte of one weight."""
    model = built(repository, "vit", "model.pt")
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)


def no_labels(repository: Path) -> None:
    built(repository, "postprocess", "labels.txt").unlink()


def short_labels(repository: Path) -> None:
    labels = built(repository, "postprocess", "labels.txt")
    labels.write_bytes(b"".join(labels.read_bytes().splitlines(True)[:-1]))


def exchanged_labels(repository: Path) -> None:
    """The right number in another order: every result would have a wrong label."""
    labels = built(repository, "postprocess", "labels.txt")
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
    name = "/model.pt" if "model" in damage.__name__ else "/labels.txt"
    assert name in result.stderr
    assert "is not the file that vit-builder" in result.stderr or "no postprocess" in result.stderr


def test_damage_while_it_serves_changes_no_answer(tiny_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    shutil.copytree(tiny_repository, repository)
    with serving(repository) as server, Client(server.url, retries=0) as client:
        before = client.classify(PHOTO, top_k=12)
        for damage in DAMAGE[:2] + DAMAGE[3:] + DAMAGE[2:3]:
            damage(repository)
            time.sleep(1.5)  # Triton polls once a second
            assert client.classify(PHOTO, top_k=12) == before
        shutil.rmtree(repository)
        time.sleep(1.5)
        assert client.classify(PHOTO, top_k=12) == before


def small_shm(megabytes: int) -> list[str]:
    """A wrapper command with its own /dev/shm."""
    return with_mounts(f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm")


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


def test_dev_shm_fills_up(tiny_repository: Path, tmp_path: Path, known: Known) -> None:
    """Triton has allocated what usual requests need beforehand."""
    repository = tmp_path / "models"
    shutil.copytree(tiny_repository, repository)
    for config in (repository / "preprocess/config.pbtxt", repository / "vit/config.pbtxt"):
        config.write_text(config.read_text().replace(str(64 << 20), str(256 << 20)))
    too_large = b"P6 7000 7000 255\n" + bytes(3 * 7000 * 7000)  # 147 MB, of 64 there are
    with serving(repository, under=small_shm(270)) as server:
        shm = Path(f"/proc/{server.process.pid}/root/dev/shm")
        with (shm / "fill").open("wb") as fill, contextlib.suppress(OSError):
            while True:
                fill.write(bytes(1 << 16))
                fill.flush()
        too_much = pytest.raises(Overloaded, match="shared memory")
        with Client(server.url, retries=0, timeout=60) as client, too_much:
            client.embed(too_large)
        assert asyncio.run(one_by_one(server.url, known)) == {"right": 96}


@contextlib.contextmanager
def memory_limit(pids: set[int], megabytes: int) -> Iterator[None]:
    """Limit these processes, together, to that much more memory from now on."""
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
    Image.new("RGB", (7000, 7000)).save(file, "JPEG")  # small until it is decoded
    with serving(tiny_repository) as server:
        pids = descendants(server.process.pid)
        with memory_limit({server.process.pid, *pids}, 64):
            with Client(server.url, retries=0, timeout=60) as client:
                client.embed(PHOTO)
                with pytest.raises(VitClientError) as caught:
                    client.embed([file.getvalue()] * 8)
            assert caught.value.retryable, caught.value
            # Depends on the process that the kernel kills.
            assert server.process.wait(60) in (1, 137, -9)
            assert gone(pids, seconds=45)


class FailsOnWhite(torch.nn.Module):
    """Fails for some batches, like a network that runs out of memory."""

    def __init__(self, served: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.served = served

    def forward(
        self, pixels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # typed, for torch.jit.script
        if bool((pixels == 255).flatten(1).all(1).any()):
            raise ValueError("white")
        return self.served(pixels)  # type: ignore[no-any-return]


async def one_by_one(url: str, known: Known, white: int = 0, retries: int = 0) -> Counter[str]:
    """Outcomes of 96 concurrent requests of one image, with some white ones in the middle."""
    images, right = known

    async def ask(i: int) -> str:
        try:
            return "right" if same(await client.embed(images[i]), right[i]) else "WRONG"
        except VitClientError as error:
            return f"{type(error).__name__}: {error.message}"

    async def ask_white() -> str:
        try:
            return f"white: {await client.embed(png(np.full((8, 8, 3), 255, np.uint8)))}"
        except VitClientError as error:
            return f"white: {error.message}"

    async with AsyncClient(url, retries=retries, timeout=30) as client:
        asking = [ask(i % len(images)) for i in range(96)]
        asking[48:48] = [ask_white() for _ in range(white)]
        return Counter(await asyncio.gather(*asking))


def malformed(model: str, name: str, datatype: str, shape: list[int]) -> pb.ModelInferRequest:
    """A string with length 100 but one byte; or a shape of zero rows with the bytes of one."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    rows = shape[0] or math.prod(shape[1:])
    data = struct.pack("<I", 100 if shape[0] else 1) + b"x" if datatype == "BYTES" else bytes(rows)
    request.raw_input_contents.append(data)
    return request


MALFORMED = {
    "string": malformed("embed", "image", "BYTES", [1, 1]),
    "no rows": malformed("preprocess", "image", "BYTES", [0, 1]),
    "no rows of pixels": malformed("vit", "pixels", "UINT8", [0, 64, 64, 3]),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_requests_beside_others(tiny_server: Server, known: Known, kind: str) -> None:
    """Some of these make Triton fail the whole batch; the SDK retries, however many there are."""

    async def run() -> tuple[int, Counter[str]]:
        async with grpc.aio.insecure_channel(tiny_server.url) as channel:
            send = GRPCInferenceServiceStub(channel).ModelInfer
            others = asyncio.ensure_future(one_by_one(tiny_server.url, known, retries=1))
            sent = 0
            while sent < 20 or not others.done():
                with pytest.raises(grpc.aio.AioRpcError):
                    await send(MALFORMED[kind], timeout=30)
                sent += 1
                await asyncio.sleep(0.02)
            return sent, await others

    sent, outcomes = asyncio.run(run())
    print(f"{sent} malformed requests")
    assert outcomes == {"right": 96}


def test_a_batch_that_fails(tiny_repository: Path, tmp_path: Path, known: Known) -> None:
    """All requests in it get an error; all others, and later ones, succeed."""
    repository = tmp_path / "models"
    shutil.copytree(tiny_repository, repository)
    model, report = built(repository, "vit", "model.pt"), repository / "build_report.json"
    torch.jit.script(FailsOnWhite(torch.jit.load(model))).save(model)
    facts = json.loads(report.read_text())
    facts["sha256"][str(model.relative_to(repository))] = hashlib.sha256(
        model.read_bytes()
    ).hexdigest()
    report.write_text(json.dumps(facts))
    with serving(repository) as server:
        outcomes = asyncio.run(one_by_one(server.url, known, white=4))
        print(outcomes)
        failed = (
            "the server failed (INTERNAL: in ensemble 'embed', the network failed: "
            "builtins.ValueError: white)"
        )
        assert set(outcomes) <= {"right", f"ServerError: {failed}", f"white: {failed}"}
        assert outcomes[f"white: {failed}"] == 4
        assert outcomes["right"] >= 64  # those in no batch with a white one
        assert asyncio.run(one_by_one(server.url, known)) == {"right": 96}
