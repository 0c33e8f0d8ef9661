"""Load generator for HTTP: `http_load.py URL FORM PHOTOS SECONDS concurrency N` or
`… intervals FILE` (microseconds between requests, one per line). Prints its figures as JSON.
"""

import asyncio
import base64
import itertools
import json
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np

WARM_UP = 3.0  # seconds


class Load:
    """Requests to one address, and how long each took."""

    def __init__(self, session: aiohttp.ClientSession, url: str, bodies: list[bytes]) -> None:
        self.session, self.url, self.bodies = session, url, itertools.cycle(bodies)
        self.done: list[tuple[float, float]] = []  # (time of the response, latency in seconds)

    async def ask(self, since: float | None = None) -> None:
        """Send one request; `since` is when it was scheduled."""
        start = since or time.perf_counter()
        headers = {"Content-Type": "application/json"}
        async with self.session.post(self.url, data=next(self.bodies), headers=headers) as answer:
            answer.raise_for_status()
            await answer.read()
        now = time.perf_counter()
        self.done.append((now, now - start))

    async def closed(self, concurrency: int, seconds: float) -> None:
        """Closed loop: keep that many requests in flight."""
        end = time.perf_counter() + seconds

        async def one_after_another() -> None:
            while time.perf_counter() < end:
                await self.ask()

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))

    async def open(self, intervals: list[float], seconds: float) -> None:
        """Open loop: send requests at given intervals, regardless of responses."""
        at = time.perf_counter()
        end = at + seconds
        tasks = []
        for interval in itertools.cycle(intervals):
            if (at := at + interval) > end:
                break
            await asyncio.sleep(at - time.perf_counter())
            tasks.append(asyncio.create_task(self.ask(at)))
        await asyncio.gather(*tasks)


async def measure(url: str, bodies: list[bytes], seconds: float, how: str, value: str) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await until_up(session, url)
        load = Load(session, url, bodies)
        begin = time.perf_counter() + WARM_UP
        if how == "concurrency":
            await load.closed(int(value), WARM_UP + seconds)
        else:
            intervals = [float(line) / 1e6 for line in Path(value).read_text().split()]
            await load.open(intervals, WARM_UP + seconds)
    took = [latency for now, latency in load.done if begin <= now < begin + seconds]
    p50, p99 = np.percentile(np.array(took) * 1000, (50, 99))
    print(json.dumps({"per_second": len(took) / seconds, "p50": p50, "p99": p99}))


async def until_up(session: aiohttp.ClientSession, url: str) -> None:
    """Return when the server listens (it loads its model first)."""
    for _ in range(600):
        try:
            async with session.get(url):
                return
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.2)
    sys.exit(f"{url} does not answer")


def main() -> None:
    url, form, photos, seconds, how, value = sys.argv[1:]
    files = [file.read_bytes() for file in sorted(Path(photos).glob("*.jpg"))]
    if form == "json":
        files = [json.dumps({"image": base64.b64encode(f).decode()}).encode() for f in files]
    asyncio.run(measure(url, files, float(seconds), how, value))


if __name__ == "__main__":
    main()
