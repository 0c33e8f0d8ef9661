"""What docker/edge costs a call, and what one tenant's flood costs another."""

import argparse
import asyncio
import contextlib
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median, quantiles

import grpc
import psutil
import vit_builder
from tritonclient.grpc import service_pb2 as pb
from vit_builder.model import ViTConfig

from .. import say
from ..load import inputs
from ..load.triton import ServerError, local_server, machine
from . import edge

METHOD = "/inference.GRPCInferenceService/ModelInfer"
CONCURRENCY = 16
QUOTA = 20  # requests/s of the tenant that sends five times as many
PACE = 10  # requests/s of the other
Figures = dict[str, float]


def message() -> bytes:
    """A request for the embedding of one photo of 0.3 megapixels."""
    photo = inputs.resized(inputs.photos(inputs.PHOTOS)[0], 0.3)
    asked = pb.ModelInferRequest(model_name="embed")
    asked.inputs.add(name="image", datatype="BYTES", shape=[1, 1])
    asked.raw_input_contents.append(struct.pack("<I", len(photo)) + photo)
    return bytes(asked.SerializeToString())


class Caller:
    """Sends one message again and again, without looking into the answers."""

    def __init__(self, sent: bytes, door: edge.Edge | None, url: str, tenant: str = "any") -> None:
        self._sent, self._url, self._door = sent, url, door
        self._metadata = (
            (("authorization", f"Bearer {door.tenants.token(tenant)}"),) if door else ()
        )
        self.refused = 0

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]]:
        if self._door is None:
            async with grpc.aio.insecure_channel(self._url) as channel:
                yield channel.unary_unary(METHOD, bytes, bytes)
            return
        credentials = grpc.ssl_channel_credentials(self._door.certificates.ca_file.read_bytes())
        target = self._door.url.removeprefix("grpcs://")
        async with grpc.aio.secure_channel(target, credentials) as channel:
            yield channel.unary_unary(METHOD, bytes, bytes)

    async def at_once(self, concurrency: int, seconds: float) -> list[float]:
        """Keep so many under way; the seconds that each took."""
        took: list[float] = []
        async with self._opened() as ask:
            await ask(self._sent, timeout=60, metadata=self._metadata)
            end = time.perf_counter() + seconds

            async def one() -> None:
                while (start := time.perf_counter()) < end:
                    await ask(self._sent, timeout=60, metadata=self._metadata)
                    took.append(time.perf_counter() - start)

            await asyncio.gather(*(one() for _ in range(concurrency)))
        return took

    async def at_pace(self, per_second: float, seconds: float) -> list[float]:
        """Send one after each interval, whether the others are answered or not."""
        took: list[float] = []
        async with self._opened() as ask:

            async def one() -> None:
                start = time.perf_counter()
                try:
                    await ask(self._sent, timeout=60, metadata=self._metadata)
                    took.append(time.perf_counter() - start)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    self.refused += 1

            begun, calls = time.perf_counter(), []
            for number in range(int(per_second * seconds)):
                await asyncio.sleep(begun + number / per_second - time.perf_counter())
                calls.append(asyncio.create_task(one()))
            await asyncio.gather(*calls)
        return took


def p99(took: list[float]) -> float:
    return quantiles(took, n=100)[98]


def calls(sent: bytes, door: edge.Edge | None, url: str, seconds: float) -> Figures:
    """One call at a time, then sixteen; and the processor time of Envoy."""
    alone = asyncio.run(Caller(sent, door, url).at_once(1, seconds))
    before = _used(door)
    many = asyncio.run(Caller(sent, door, url).at_once(CONCURRENCY, seconds))
    return {
        "one call, median ms": 1e3 * median(alone),
        "one call, p99 ms": 1e3 * p99(alone),
        f"calls/s at {CONCURRENCY}": len(many) / seconds,
        "Envoy, core-ms a call": 1e3 * (_used(door) - before) / len(many),
    }


def _used(door: edge.Edge | None) -> float:
    if door is None:
        return 0
    times = psutil.Process(door.process.pid).cpu_times()
    return times.user + times.system


def neighbours(sent: bytes, door: edge.Edge, seconds: float) -> Figures:
    """One tenant alone, then beside one that sends five times its quota."""

    async def beside() -> tuple[list[float], list[float]]:
        return await asyncio.gather(quiet.at_pace(PACE, seconds), flood.at_pace(5 * QUOTA, seconds))

    quiet, flood = (Caller(sent, door, "", tenant) for tenant in ("quiet", "flood"))
    alone = asyncio.run(quiet.at_pace(PACE, seconds))
    both, answered = asyncio.run(beside())
    return {
        "quiet tenant alone, p99 ms": 1e3 * p99(alone),
        "beside the flood, p99 ms": 1e3 * p99(both),
        "quiet tenant, refused": quiet.refused,
        "flood, answered/s": len(answered) / seconds,
        "flood, refused/s": flood.refused / seconds,
    }


def quotas(*, free: bool) -> str:
    """routes.yaml without a quota, or with QUOTA for every tenant."""
    shipped = "max_tokens: 200, tokens_per_fill: 100,"
    text = (edge.EDGE / "routes.yaml").read_text()
    assert shipped in text
    tokens = 10**6 if free else QUOTA
    return text.replace(shipped, f"max_tokens: {tokens}, tokens_per_fill: {tokens},")


@contextlib.contextmanager
def repository() -> Iterator[Path]:
    """A network that costs next to nothing, so that the edge's part shows."""
    config = ViTConfig((256, 256), 12, num_layers=1, num_heads=1, hidden_dim=16, mlp_dim=16)
    settings = vit_builder.Settings("fp32", max_batch_size=16, top_k=12)
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "models")
        vit_builder.build(vit_builder.random(config), settings, built)
        yield built


def measure(rounds: int, seconds: float) -> list[dict[str, Figures]]:
    sent, found = message(), []
    free = quotas(free=True)
    with (
        repository() as built,
        local_server(built) as address,
        tempfile.TemporaryDirectory() as folder,
        edge.running(
            Path(folder), {"vit": [address.host]}, edit={"routes.yaml": lambda _: free}
        ) as door,
    ):
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            figures = {
                "direct": calls(sent, None, address.host, seconds),
                "edge": calls(sent, door, "", seconds),
            }
            door.rewrite("routes.yaml", quotas(free=False))
            time.sleep(1)
            figures["tenants"] = neighbours(sent, door, 2 * seconds)
            door.rewrite("routes.yaml", free)
            time.sleep(1)
            found.append(figures)
    return found


def report(found: list[dict[str, Figures]]) -> str:
    def of(part: str, name: str) -> float:
        return median(one[part][name] for one in found)

    lines = [
        f"{machine()}; medians of {len(found)} rounds; a network that costs next to nothing, "
        "photos of 0.3 megapixels\n",
        "| | direct | through the edge |",
        "|---|---:|---:|",
    ]
    for name in found[0]["direct"]:
        lines.append(f"| {name} | {of('direct', name):.2f} | {of('edge', name):.2f} |")
    lines += [f"\n| two tenants, quota {QUOTA}/s each | |", "|---|---:|"]
    lines += [f"| {name} | {of('tenants', name):.2f} |" for name in found[0]["tenants"]]
    return "\n".join(lines)


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.edge",
        description="Measure what docker/edge adds to a call: latency, processor time, throughput; "
        "and what one tenant's flood costs another. Run it on an otherwise idle machine.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these (default: 3)")
    parser.add_argument("--seconds", type=float, default=10, help="of a window (default: 10)")
    args = parser.parse_args()
    try:
        print(report(measure(args.rounds, args.seconds)))
    except (ServerError, RuntimeError) as e:
        print(f"bench-edge: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
