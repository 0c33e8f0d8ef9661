"""Graceful shutdown: accepted requests complete, later ones are rejected, nothing is left."""

import asyncio
import contextlib
import http.client
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest
from conftest import BIN, PHOTOS, Server, serving
from processes import FREE_PORTS, descendants, gone, segments, started, workspaces
from tritonclient.grpc import service_pb2_grpc
from vit_client import AsyncClient, Unavailable, _wire
from vit_client._question import question
from vit_client.errors import from_grpc

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
TASKS = ("classify", "probabilities", "embed", "features", "analyze")


async def stop_under_load(server: Server, number: int, before: Counter[str]) -> Counter[str]:
    """Outcomes of requests sent after the signal; those sent before it are added to `before`.

    One sent just before the signal may not have arrived yet, so it counts as sent after.
    """
    after: Counter[str] = Counter()
    told = 0.0

    async def ask(stub: service_pb2_grpc.GRPCInferenceServiceStub, task: str) -> None:
        while True:
            started = time.monotonic()
            try:
                await stub.ModelInfer(_wire.request(question(task), [PHOTO] * 8), timeout=100)
                outcome = "answered"
            except grpc.aio.AioRpcError as error:
                kind = from_grpc(error, url="", task=task, timeout=100)
                outcome = "Unavailable" if isinstance(kind, Unavailable) else str(kind)
            (before if not told or started < told - 0.5 else after)[outcome] += 1
            if told and server.process.poll() is not None:
                return
            await asyncio.sleep(0 if outcome == "answered" else 0.1)

    async with grpc.aio.insecure_channel(server.url, _wire_options()) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        asking = [asyncio.ensure_future(ask(stub, task)) for task in TASKS * 16]
        while sum(before.values()) < 100:
            await asyncio.sleep(0.1)
        assert set(before) == {"answered"}
        answered = before["answered"]
        server.process.send_signal(number)
        told = time.monotonic()
        await asyncio.gather(*asking)
    # There were requests in flight.
    assert before["answered"] - answered > 10
    return after


def _wire_options() -> list[tuple[str, int]]:
    return [("grpc.max_receive_message_length", -1), ("grpc.max_reconnect_backoff_ms", 100)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_accepted_is_lost(tiny_repository: Path, number: signal.Signals) -> None:
    before: Counter[str] = Counter()
    with serving(tiny_repository) as server:
        pids = descendants(server.process.pid)
        after = asyncio.run(stop_under_load(server, number, before))
        assert server.process.wait(60) == 0
        print("sent before:", dict(before), "sent after:", dict(after))
        assert set(before) == {"answered"}
        assert after["Unavailable"] > 0
        assert set(after) <= {"answered", "Unavailable"}
        assert gone(pids)
        assert not segments(server.process.pid)
        assert not workspaces(server.process.pid)


def test_http_requests_are_answered_too(tiny_repository: Path) -> None:
    answers: list[tuple[float, float, int]] = []  # sent, answered, status

    def ask(host: str) -> None:
        headers = {"Inference-Header-Content-Length": "0"}
        while True:
            started = time.monotonic()
            connection = http.client.HTTPConnection(host, timeout=60)
            try:
                connection.request("POST", "/v2/models/embed/infer", PHOTO, headers)
                status = connection.getresponse().status
            except ConnectionRefusedError:
                return
            except (OSError, http.client.HTTPException):
                status = 0
            connection.close()
            answers.append((started, time.monotonic(), status))

    with serving(tiny_repository) as server:
        host = server.http_url.removeprefix("http://")
        threads = [threading.Thread(target=ask, args=(host,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        while len(answers) < 100:
            time.sleep(0.1)
        told = time.monotonic()
        server.process.terminate()
        assert server.process.wait(60) == 0
        for thread in threads:
            thread.join()
    assert {status for sent, _, status in answers if sent < told} == {200}
    # 404: the model is unloaded; 503: shutting down; 0: no response.
    assert {status for sent, _, status in answers if sent >= told} <= {200, 404, 503, 0}


def test_callers_of_the_sdk_notice_nothing_where_there_is_another_server(
    tiny_repository: Path, tiny_server: Server
) -> None:
    async def ask(client: AsyncClient, server: Server) -> int:
        async def embed() -> int:
            done = 0
            while server.process.poll() is None:
                assert (await client.embed([PHOTO] * 4)).shape == (4, 64)
                done += 1
            return done

        asking = [asyncio.ensure_future(embed()) for _ in range(8)]
        await asyncio.sleep(2)
        server.process.terminate()
        return sum(await asyncio.gather(*asking))

    async def run(server: Server) -> int:
        async with AsyncClient(f"ipv4:{tiny_server.url},{server.url}") as client:
            return await ask(client, server)

    with serving(tiny_repository) as server:
        assert asyncio.run(run(server)) > 0
        assert server.process.wait(60) == 0


def idle_connection(server: Server) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(server.http_url.removeprefix("http://"), timeout=60)
    connection.request("GET", "/v2/health/ready")
    assert connection.getresponse().read() == b""
    return connection


def test_an_idle_http_connection_does_not_keep_it(tiny_repository: Path) -> None:
    """Triton alone waits for it, then gives up with exit code 1."""
    with serving(tiny_repository) as server, contextlib.closing(idle_connection(server)):
        server.process.terminate()
        assert server.process.wait(60) == 0


def test_a_second_signal_ends_it_at_once(tiny_repository: Path) -> None:
    with serving(tiny_repository) as server:
        pids = descendants(server.process.pid)
        with contextlib.closing(idle_connection(server)):  # held open for a while
            server.process.terminate()
            time.sleep(1.5)
            server.process.terminate()
            assert server.process.wait(60) == 130
        assert gone(pids)
        assert not segments(server.process.pid)
        assert not workspaces(server.process.pid)


def test_what_a_terminal_sends_twice_in_one_moment_is_one_signal(tiny_repository: Path) -> None:
    """A terminal's SIGINT goes to the whole process group, and a wrapper often forwards its own."""
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    with started(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        for line in process.stdout or ():
            if line.startswith("Ready"):
                break
        os.killpg(process.pid, signal.SIGINT)
        process.terminate()
        assert process.wait(60) == 0
