"""Checks of the running tritonserver: whether every model answers, and draining.

Over HTTP, which has no TLS in Triton and so needs no client certificate.
"""

import json
import re
import struct
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from tritonclient.utils import triton_to_np_dtype

from .process import TritonProcess
from .tritonserver import KEY_HEADER, LOOPBACK, Ports, ServerError

# A numeric output of each ensemble; together the ensembles cover all models.
ENSEMBLES = {
    "classify": "scores",
    "probabilities": "probabilities",
    "embed": "embedding",
    "features": "neck",
    "analyze": "embedding",
    "everything": "embedding",
}
GRAY_PIXEL = b"P6 1 1 255\n\x80\x80\x80"  # a whole image, in PPM
START_SECONDS = 600
DRAIN_SECONDS = 30

# Triton's error if a model's process has shown no sign of life for a second. On a machine that
# busy, the first request gets it.
_STALLED = re.compile("Stub process .* is not healthy")

# Ignore proxies from the environment: tritonserver runs on this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Stalled(ServerError):
    """A model's process got no CPU for a second, which Triton takes for its death."""


def wait_until_answering(process: TritonProcess, ports: Ports, key: str) -> None:
    """Return when every model has answered a real request, or the process was told to stop.

    READY alone proves little: a model can be ready and fail every request. And another server may
    have taken the port at the last moment: only ours allows a restricted call with this `key`.

    Raises:
        Stalled: a model's process got no CPU; a second try may succeed.
        ServerError: it has exited, or a model does not answer.
    """
    deadline = time.monotonic() + START_SECONDS
    while not process.stopping and not (
        _status(ports, "health/ready") == 200 and _status(ports, "logging", key) == 200
    ):
        if process.exited():
            raise process.failure()
        if time.monotonic() > deadline:
            raise ServerError(f"tritonserver was not ready after {START_SECONDS} s")
        time.sleep(0.1)
    for ensemble, output in ENSEMBLES.items():
        if process.stopping:
            return
        _infer(ports, ensemble, output)


def try_largest_batch(ports: Ports, images: int) -> None:
    """Send the batch that warm-up would run. Raises ServerError with the model's own error."""
    _infer(ports, "embed", "embedding", images)


def drain(process: TritonProcess, ports: Ports, models: Path) -> bool:
    """Complete all accepted requests and reject new ones; return whether all were completed.

    On a signal Triton 2.51 stops all models at once, and a request between two steps of an
    ensemble is lost. But a model removed from the repository is unloaded gracefully: it rejects
    new requests and completes those it has.
    """
    for ensemble in ENSEMBLES:
        (models / ensemble).rename(models.with_name(f"drained-{ensemble}"))
    deadline = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < deadline and not process.exited() and not process.hurried:
        # Triton polls once a second, and is not ready itself until it has unloaded the models.
        closed = all(_status(ports, f"models/{name}/ready") == 400 for name in ENSEMBLES)
        if closed and _status(ports, "health/ready") == 200:
            return True
        time.sleep(0.05)
    return False


def _url(ports: Ports, path: str) -> str:
    return f"http://{LOOPBACK}:{ports.http}/v2/{path}"


def _status(ports: Ports, path: str, key: str = "") -> int:
    """Return the HTTP status; 0 if the server does not answer."""
    try:
        request = urllib.request.Request(_url(ports, path), headers={KEY_HEADER: key})
        with _opener.open(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return 0


def _infer(ports: Ports, ensemble: str, output: str, images: int = 1) -> None:
    rows = (struct.pack("<I", len(GRAY_PIXEL)) + GRAY_PIXEL) * images
    size = {"binary_data_size": len(rows)}
    image = {"name": "image", "datatype": "BYTES", "shape": [images, 1], "parameters": size}
    wanted = {"name": output, "parameters": {"binary_data": True}}
    header = json.dumps({"inputs": [image], "outputs": [wanted]}).encode()
    request = urllib.request.Request(
        _url(ports, f"models/{ensemble}/infer"),
        header + rows,
        {"Inference-Header-Content-Length": str(len(header))},
    )
    try:
        with _opener.open(request, timeout=120) as response:
            start = int(response.headers["Inference-Header-Content-Length"])
            body = response.read()
            datatype = json.loads(body[:start])["outputs"][0]["datatype"]
            numbers = np.frombuffer(body[start:], triton_to_np_dtype(datatype))
    except urllib.error.HTTPError as e:
        reason = json.loads(e.read())["error"]
        kind = Stalled if _STALLED.search(reason) else ServerError
        raise kind(f"{ensemble} is loaded but its requests fail: {reason}") from e
    except OSError as e:
        raise ServerError(f"{ensemble} is loaded but its requests fail: {e}") from e
    if not np.isfinite(numbers).all():
        raise ServerError(f"{ensemble} returns numbers that are not finite")
