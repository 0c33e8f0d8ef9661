"""Open-loop load: requests arrive whether the server keeps up or not."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from vit_client import Overloaded, _wire
from vit_client._question import question
from vit_client.errors import from_grpc

NS = 1e-9


@dataclass
class Outcome:
    """Outcomes of the requests, of one image each, and the server's work meanwhile."""

    seconds: float = 0  # until the last response
    answered: list[float] = field(default_factory=list)  # latency of each, in seconds
    refused: list[float] = field(default_factory=list)
    wrong: int = 0
    other: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)  # by model, executed
    busy: Counter[str] = field(default_factory=Counter)  # by model, average busy processes
    callers: float = 0  # average cores used by this process, which the server lacks

    @property
    def rate(self) -> float:
        return len(self.answered) / self.seconds

    def __str__(self) -> str:
        def ms(seconds: list[float]) -> str:
            if not seconds:
                return "none"
            p50, p99, last = (1000 * np.quantile(seconds, q) for q in (0.5, 0.99, 1))
            return f"{len(seconds)} in p50 {p50:.1f}, p99 {p99:.1f}, max {last:.1f} ms"

        busy = {name: round(share, 2) for name, share in self.busy.items() if share > 0.05}
        return (
            f"{self.rate:.1f}/s; answered {ms(self.answered)}; refused {ms(self.refused)}; "
            f"wrong {self.wrong}, other {dict(self.other)}; images {dict(self.images)}; "
            f"busy {busy}; callers {self.callers:.2f} cores"
        )


class Load:
    """Sends images with known embeddings to `embed`."""

    def __init__(self, url: str, images: list[bytes], tolerance: float) -> None:
        self.url, self.images, self.tolerance = url, images, tolerance

    async def closed(self, callers: int, seconds: float) -> Outcome:
        """Closed loop: `callers` that each send a request when the last one is answered."""

        async def send(one: Callable[[], Awaitable[None]]) -> None:
            async def caller() -> None:
                while time.monotonic() < end:
                    await one()

            end = time.monotonic() + seconds
            await asyncio.gather(*(caller() for _ in range(callers)))

        return await self._observe(send)

    async def open(self, rate: float, count: int) -> Outcome:
        """Open loop: `rate` requests per second, at random times, however many are in flight."""

        async def send(one: Callable[[], Awaitable[None]]) -> None:
            due = time.monotonic()
            sent = []
            for _ in range(count):
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                sent.append(asyncio.ensure_future(one()))
                due += random.expovariate(rate)
            await asyncio.gather(*sent)

        return await self._observe(send)

    async def _observe(
        self, send: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
    ) -> Outcome:
        async with grpc.aio.insecure_channel(self.url) as channel:
            stub = GRPCInferenceServiceStub(channel)
            # Serialized once, because the callers use the same cores as the server.
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            requests = [
                _wire.request(question("embed"), [data]).SerializeToString() for data in self.images
            ]
            known = [_embedding(await infer(request)) for request in requests]
            outcome = Outcome()

            async def one() -> None:
                i = random.randrange(len(known))
                started = time.monotonic()
                try:
                    response = await infer(requests[i], timeout=120)
                except grpc.aio.AioRpcError as failure:
                    error = from_grpc(failure, url="", task="embed", timeout=120)
                    if isinstance(error, Overloaded):
                        outcome.refused.append(time.monotonic() - started)
                    else:
                        outcome.other[error.message] += 1
                    return
                outcome.answered.append(time.monotonic() - started)
                difference = np.abs(_embedding(response) - known[i]).max()
                outcome.wrong += bool(difference > self.tolerance)

            before = await executed(stub)
            started, used = time.monotonic(), time.process_time()
            await send(one)
            outcome.seconds = time.monotonic() - started
            outcome.callers = (time.process_time() - used) / outcome.seconds
            after = await executed(stub)
        for name, (images, seconds) in after.items():
            outcome.images[name] = images - before[name][0]
            outcome.busy[name] = (seconds - before[name][1]) / outcome.seconds
        return outcome


async def executed(stub: GRPCInferenceServiceStub) -> dict[str, tuple[int, float]]:
    """Images and seconds of execution by model, from the server's statistics."""
    answer = await stub.ModelStatistics(pb.ModelStatisticsRequest())
    return {
        model.name: (
            model.inference_count,
            sum(
                part.ns * NS
                for batch in model.batch_stats
                for part in (batch.compute_input, batch.compute_infer, batch.compute_output)
            ),
        )
        for model in answer.model_stats
    }


def _embedding(response: bytes) -> npt.NDArray[np.float32]:
    answer = pb.ModelInferResponse.FromString(response)
    return np.frombuffer(answer.raw_output_contents[0], np.float32)
