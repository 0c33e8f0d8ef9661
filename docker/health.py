"""Ask the server about a real photo: exit code 0 where it answers, 1 and a reason where not.

`/v2/health/ready` proves little: tritonserver stays ready when the process of a Python model has
died, and fails every request. `embed` and `classify` together need all three models. Python's
standard library only, so that it runs in any image, and as a Kubernetes exec probe:

    python3 health.py [http://127.0.0.1:8000]
"""

import base64
import json
import math
import struct
import sys
import urllib.error
import urllib.request

TIMEOUT = 10  # seconds, for each of the two
# photos/coffee.jpg in 16 x 16 pixels: a JPEG like those that callers send
PHOTO = base64.b64decode("""
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1R
V19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj
Y2NjY2NjY2NjY2NjY2P/wAARCAAQABADASIAAhEBAxEB/8QAFwAAAwEAAAAAAAAAAAAAAAAAAAQFBv/EACQQAAEDAwMEAwAA
AAAAAAAAAAECAxEABEESIWEFBjFxgZGh/8QAFQEBAQAAAAAAAAAAAAAAAAAABAX/xAAYEQADAQEAAAAAAAAAAAAAAAAAAREC
Ev/aAAwDAQACEQMRAD8AX6Owi1cUy22lbwSCNeTn8xVBxxsXggBtYALiR4B4rP8AcKX2LsJ3BWkKRiefiiwc1yEzsBqkzB9/
ZoLy5WUlzYj/2Q==
""")
# A full queue is a busy server, not a broken one: to take it away would make the others fuller.
BUSY = "Exceeds maximum queue size"


class Unhealthy(Exception):
    """The message says what is wrong."""


def main() -> int:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    try:
        for model in ("embed", "classify"):
            check(url, model)
    except Unhealthy as e:
        print(f"{model}: {e}")
        return 1
    return 0


def check(url: str, model: str) -> None:
    """One request; its answer must be numbers."""
    # With this header the body is the file itself: Triton's "raw binary request".
    header = {"Inference-Header-Content-Length": "0"}
    request = urllib.request.Request(f"{url}/v2/models/{model}/infer", PHOTO, header)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=TIMEOUT) as response:
            size = int(response.headers["Inference-Header-Content-Length"])
            outputs = json.loads(response.read(size))["outputs"]
            tensors = response.read()
    except urllib.error.HTTPError as e:
        reason = e.read().decode(errors="replace")
        if BUSY not in reason:
            raise Unhealthy(f"HTTP {e.code} {reason}") from e
    except OSError as e:  # nothing listens, or no answer in time
        raise Unhealthy(str(e)) from e
    else:
        start = 0
        for output in outputs:
            stop = start + output["parameters"]["binary_data_size"]
            if output["datatype"] == "FP32":
                numbers = struct.iter_unpack("<f", tensors[start:stop])
                if not all(math.isfinite(number) for (number,) in numbers):
                    raise Unhealthy(f"{output['name']} has numbers that are not finite")
            start = stop


if __name__ == "__main__":
    sys.exit(main())
