"""Holds `preprocess` back while `vit` has enough to do."""

import re
import time
from http.client import HTTPConnection, HTTPException

import triton_python_backend_utils as pb_utils


class Backlog:
    """What waits for `vit`, by Triton's own count in its metrics.

    On a CPU `vit` is the slower one. preprocess stops while a full batch waits there; then its own
    queue, which has a limit, fills up, and Triton refuses the rest before anything is decoded.
    """

    PENDING = re.compile(rb'nv_inference_pending_request_count\{model="vit",[^}]*\} (\d+)')
    POLL = 0.01  # seconds; a look costs 0.3 ms

    def __init__(self, address, limit):
        try:
            HTTPConnection(address)
        except HTTPException:
            raise pb_utils.TritonModelException(f"VIT_METRICS={address} is not HOST:PORT") from None
        self.address, self.limit = address, limit
        self.room = 0  # requests that may be sent on before looking again

    def wait(self, requests):
        """Return when `vit` wants more, and count these requests as sent."""
        while self.room <= 0:
            self.room = self.limit - self.pending()
            if self.room <= 0:
                time.sleep(self.POLL)
        self.room -= requests

    def pending(self):
        connection = HTTPConnection(self.address, timeout=1)
        try:
            connection.request("GET", "/metrics")
            found = self.PENDING.search(connection.getresponse().read())
        except (OSError, HTTPException):  # no metrics, no limit
            return 0
        finally:
            connection.close()
        return int(found[1]) if found else 0
