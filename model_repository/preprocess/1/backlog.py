"""Holds `preprocess` back while `vit` has enough to do."""

import re
import socket
import time
from collections import deque
from statistics import fmean

import triton_python_backend_utils as pb_utils


class Backlog:
    """Images that wait for `vit`, from Triton's own count of requests in its metrics.

    Where `vit` is the slower one, preprocess stops while `limit` images wait there; then its own
    queue, which has a limit, fills up, and Triton refuses the rest before anything is decoded.
    """

    PENDING = re.compile(rb'nv_inference_pending_request_count\{model="vit",[^}]*\} (\d+)')
    REST = 9  # times as long as a look (0.3 ms of a core, here and in Triton) until the next one

    def __init__(self, address, limit):
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise pb_utils.TritonModelException(f"VIT_METRICS={address} is not HOST:PORT")
        self.address, self.limit = (host.strip("[]"), int(port)), limit
        self.rows = deque([1], maxlen=64)  # of the last requests
        self.room = 0.0  # images that may be sent on before looking again

    def wait(self):
        """Return when `vit` wants more."""
        while self.room <= 0:
            begun = time.monotonic()
            self.room = self.limit - self.pending() * fmean(self.rows)
            if self.room <= 0:
                time.sleep(self.REST * (time.monotonic() - begun))

    def sent(self, rows):
        """Count the rows of each request of a batch as on their way to `vit`."""
        self.room -= sum(rows)
        self.rows.extend(rows)

    def pending(self):
        """Requests. By hand: http.client takes longer over the headers than all else does, and has
        Python's lock."""
        answer = b""
        try:
            with socket.create_connection(self.address, timeout=1) as connection:
                connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                while part := connection.recv(2**16):
                    answer += part
        except OSError:  # no metrics, no limit
            return 0
        found = self.PENDING.search(answer)
        return int(found[1]) if found else 0
