"""Ask the server about a real photo: exit code 0 where it answers, 1 and a reason where not.

`/v2/health/ready` proves little: tritonserver stays ready when the process of a Python model has
died, and fails every request. `embed` and `classify` together need all three models. A server that
is too busy for this photo is well as long as it answers others. Python's standard library only, so
that it runs in any image, and as a Kubernetes exec probe:

    python3 health.py [http://127.0.0.1:8000]
    python3 health.py --live [http://127.0.0.1:8000]   # whether to restart it: never for being busy

After some CUDA errors (an illegal address, ECC) every request fails until the process ends, while
`/v2/health/live` stays 200. So `--live` asks about the photo too, and takes an error for the end,
but not an answer that does not come.
"""

import argparse
import base64
import contextlib
import json
import math
import struct
import sys
import time
import urllib.error
import urllib.request

TIMEOUT = 10  # seconds, for each question
# photos/coffee.jpg in 16 x 16 pixels: a JPEG like those that callers send
PHOTO = base64.b64decode("""
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1R
V19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj
Y2NjY2NjY2NjY2NjY2P/wAARCAAQABADASIAAhEBAxEB/8QAFwAAAwEAAAAAAAAAAAAAAAAAAAQFBv/EACQQAAEDAwMEAwAA
AAAAAAAAAAECAxEABEESIWEFBjFxgZGh/8QAFQEBAQAAAAAAAAAAAAAAAAAABAX/xAAYEQADAQEAAAAAAAAAAAAAAAAAAREC
Ev/aAAwDAQACEQMRAD8AX6Owi1cUy22lbwSCNeTn8xVBxxsXggBtYALiR4B4rP8AcKX2LsJ3BWkKRiefiiwc1yEzsBqkzB9/
ZoLy5WUlzYj/2Q==
""")
# What a busy server says, if anything. To take it away would make the others busier.
BUSY = (
    "Exceeds maximum queue size",
    "Request timeout expired",
    "too many large requests are in flight",
)
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unhealthy(Exception):
    """The message says what is wrong."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask the server about a photo.")
    parser.add_argument("--live", action="store_true", help="not well only where errors come back")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="(%(default)s)")
    args = parser.parse_args()
    ask_one, url = live if args.live else check, args.url.rstrip("/")
    try:
        for model in ("embed", "classify"):
            ask_one(url, model)
    except Unhealthy as e:
        print(f"{model}: {e}")
        return 1
    return 0


def check(url: str, model: str) -> None:
    """One request; its answer must be numbers, or others must get theirs meanwhile."""
    try:
        deadline = time.monotonic() + TIMEOUT
        before = answers(url)
        if not ask(url, model):
            while answers(url) == before:
                if time.monotonic() > deadline:
                    raise Unhealthy(f"no answer in {TIMEOUT} s, to anybody")
                time.sleep(0.5)
    except urllib.error.HTTPError as e:
        raise Unhealthy(f"HTTP {e.code} {e.read().decode(errors='replace')}") from e
    except OSError as e:  # nothing listens, or it does not even tell its statistics
        raise Unhealthy(str(e)) from e


def live(url: str, model: str) -> None:
    """One request, to which an error must not be the answer."""
    try:
        with direct.open(f"{url}/v2/health/live", timeout=TIMEOUT):
            pass
    except OSError as e:
        raise Unhealthy(f"/v2/health/live: {e}") from e
    with contextlib.suppress(OSError):
        ask(url, model)


def ask(url: str, model: str) -> bool:
    """Send the photo; False where the server was too busy for it."""
    # With this header the body is the file itself: Triton's "raw binary request".
    header = {"Inference-Header-Content-Length": "0"}
    request = urllib.request.Request(f"{url}/v2/models/{model}/infer", PHOTO, header)
    try:
        with direct.open(request, timeout=TIMEOUT) as response:
            size = int(response.headers["Inference-Header-Content-Length"])
            outputs = json.loads(response.read(size))["outputs"]
            tensors = response.read()
    except TimeoutError:
        return False
    except urllib.error.HTTPError as e:
        reason = e.read().decode(errors="replace")
        if any(busy in reason for busy in BUSY):
            return False
        raise Unhealthy(f"HTTP {e.code} {reason}") from e
    start = 0
    for output in outputs:
        stop = start + output["parameters"]["binary_data_size"]
        if output["datatype"] == "FP32":
            numbers = struct.iter_unpack("<f", tensors[start:stop])
            if not all(math.isfinite(number) for (number,) in numbers):
                raise Unhealthy(f"{output['name']} has numbers that are not finite")
        start = stop
    return True


def answers(url: str) -> int:
    """How many requests the network has answered so far."""
    with direct.open(f"{url}/v2/models/vit/stats", timeout=TIMEOUT) as response:
        (vit,) = json.load(response)["model_stats"]
    return int(vit["inference_stats"]["success"]["count"])


if __name__ == "__main__":
    sys.exit(main())
