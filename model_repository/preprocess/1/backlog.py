"""Backpressure: pauses `preprocess` while enough images are queued for `vit`."""

import re
import socket
import time
from collections import deque
from itertools import islice

import triton_python_backend_utils as pb_utils

ADDRESS = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+):(\d{1,5})")


class Backlog:
    """Images queued for `vit`, from the count of pending requests in Triton's metrics.

    If `vit` is the bottleneck, each process of preprocess pauses while `limit` of its images are
    queued there; then preprocess's bounded queue fills up, and Triton rejects further requests
    before anything is decoded.
    """

    PENDING = re.compile(rb'nv_inference_pending_request_count\{model="vit",[^}]*\} (\d+)')
    LOOK = 1.0  # timeout in seconds; a look usually takes 1 ms of CPU time, most of it in Triton
    REST, LONGEST = 9, 0.05  # pause before the next look: REST times its duration, at most LONGEST

    def __init__(self, address, limit, processes):
        found = ADDRESS.fullmatch(address)
        if not found or int(found[2]) >= 2**16:
            raise pb_utils.TritonModelException(f"VIT_METRICS={address} is not HOST:PORT")
        self.address = found[1].strip("[]"), int(found[2])
        self.limit, self.processes = limit, processes
        self.rows = deque(maxlen=1024)  # of this process's requests, the latest last
        self.room = 0  # images that may be passed on before the next look

    def wait(self):
        """Return when fewer than `limit` images are queued for `vit`."""
        while self.room <= 0:
            begun = time.monotonic()
            self.room = self.limit - self.waiting()
            if self.room <= 0:
                took = time.monotonic() - begun
                time.sleep(min(self.REST * took, self.LONGEST))

    def sent(self, rows):
        """Record the rows of each request in a batch that is passed on to `vit`."""
        self.room -= sum(rows)
        self.rows.extend(rows)

    def waiting(self):
        """Return this process's queued images: the rows of its share of the pending requests."""
        share = -(-self.pending() // self.processes)
        return sum(islice(reversed(self.rows), share))

    def pending(self):
        """Return the number of requests pending for `vit`; 0 without metrics.

        A raw socket: http.client would take longer to parse the headers than everything else,
        while holding the GIL.
        """
        answer, end = b"", time.monotonic() + self.LOOK
        try:
            with socket.create_connection(self.address, timeout=self.LOOK) as connection:
                connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                while time.monotonic() < end and (part := connection.recv(2**16)):
                    answer += part
        except (OSError, UnicodeError):  # no metrics (or an invalid host name), no limit
            return 0
        found = self.PENDING.search(answer)
        return int(found[1]) if found else 0
