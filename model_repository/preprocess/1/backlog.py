"""Holds `preprocess` back while `vit` has enough to do."""

import re
import socket
import time
from collections import deque
from itertools import islice

import triton_python_backend_utils as pb_utils

ADDRESS = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+):(\d{1,5})")


class Backlog:
    """Images that wait for `vit`, from Triton's own count of requests in its metrics.

    Where `vit` is the slower one, each process of preprocess stops while `limit` of its images wait
    there; then preprocess's queue, which has a limit, fills up, and Triton refuses the rest before
    anything is decoded.
    """

    PENDING = re.compile(rb'nv_inference_pending_request_count\{model="vit",[^}]*\} (\d+)')
    LOOK = 1.0  # seconds that it may take; usually it is 1 ms of a core, most of it in Triton
    REST, LONGEST = 9, 0.05  # then so many times as long, or seconds at most, until the next one

    def __init__(self, address, limit, processes):
        found = ADDRESS.fullmatch(address)
        if not found or int(found[2]) >= 2**16:
            raise pb_utils.TritonModelException(f"VIT_METRICS={address} is not HOST:PORT")
        self.address = found[1].strip("[]"), int(found[2])
        self.limit, self.processes = limit, processes
        self.rows = deque(maxlen=1024)  # of this process's requests, the last one last
        self.room = 0  # images that may be sent on before looking again

    def wait(self):
        """Return when `vit` wants more."""
        while self.room <= 0:
            begun = time.monotonic()
            self.room = self.limit - self.waiting()
            if self.room <= 0:
                took = time.monotonic() - begun
                time.sleep(min(self.REST * took, self.LONGEST))

    def sent(self, rows):
        """Count the rows of each request of a batch as on their way to `vit`."""
        self.room -= sum(rows)
        self.rows.extend(rows)

    def waiting(self):
        """Images of this process: those of its last requests, as many as are its share."""
        share = -(-self.pending() // self.processes)
        return sum(islice(reversed(self.rows), share))

    def pending(self):
        """Requests. By hand: http.client takes longer over the headers than all else does, and has
        Python's lock."""
        answer, end = b"", time.monotonic() + self.LOOK
        try:
            with socket.create_connection(self.address, timeout=self.LOOK) as connection:
                connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                while time.monotonic() < end and (part := connection.recv(2**16)):
                    answer += part
        except (OSError, UnicodeError):  # no metrics (of a name that is none), no limit
            return 0
        found = self.PENDING.search(answer)
        return int(found[1]) if found else 0
