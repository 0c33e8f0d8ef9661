"""The same model behind a FastAPI endpoint. FastAPI has no batching, so this has the usual queue:
while one batch runs, the requests that arrive form the next.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import network
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from network import MAX_BATCH, Pixels

served = network.Served(Path(sys.argv[1]))
waiting: asyncio.Queue[tuple[Pixels, asyncio.Future[Any]]] = asyncio.Queue()


async def run_batches() -> None:
    while True:
        batch = [await waiting.get()]
        while len(batch) < MAX_BATCH and not waiting.empty():
            batch.append(waiting.get_nowait())
        results = await run_in_threadpool(served.embed, [pixels for pixels, _ in batch])
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(run_batches())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/embed")
async def embed(request: Request) -> dict[str, list[float]]:
    pixels = await run_in_threadpool(network.decode, await request.body(), served.size)
    future = asyncio.get_running_loop().create_future()
    await waiting.put((pixels, future))
    return {"embedding": (await future).tolist()}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
