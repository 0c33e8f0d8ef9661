"""HTTP for serve.sh: `python3 front.py REPOSITORY ADDRESS:PORT=BEHIND…` passes it on to loopback.

Why Triton's own HTTP must not be reached by others is told in http_front.py.
"""

import asyncio
import re
import socket
import sys
from pathlib import Path

from http_front import MAX_REQUEST_BYTES, HttpFront


def main() -> None:
    repository, *routes = sys.argv[1:]
    config = Path(repository, "preprocess", "config.pbtxt").read_text("utf-8")
    most = re.search(r'"max_request_bytes"\s+value \{\s+string_value: "(\d+)"', config)
    listening = {}
    for route in routes:
        host, port, behind = re.fullmatch(r"(.*):(\d+)=(\d+)", route).groups()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        place = host.strip("[]"), int(port)
        listening[socket.create_server(place, family=family)] = int(behind)
    front = HttpFront(listening, int(most[1]) if most else MAX_REQUEST_BYTES)
    asyncio.run(front.serve(asyncio.Event()))


if __name__ == "__main__":
    main()
