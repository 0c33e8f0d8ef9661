"""`make lint`'s look at known vulnerabilities, against an OSV of our own."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).parents[1] / "tools" / "audit.py"
ADVISORY = {
    "id": "TEST-1",
    "published": "2026-01-01T00:00:00Z",
    "modified": "2026-01-01T00:00:00Z",
    "details": "made for this test",
    "affected": [
        {
            "package": {"name": "pillow", "ecosystem": "PyPI"},
            "ranges": [
                {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999"}]},
            ],
        }
    ],
}


class Osv(http.server.BaseHTTPRequestHandler):
    vulnerable = ""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        bad = asked["package"]["name"] == self.vulnerable
        answer = json.dumps({"vulns": [ADVISORY]} if bad else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def osv() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def audit(url: str) -> tuple[int, str]:
    command = [sys.executable, AUDIT, "--osv-url", url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return result.returncode, result.stdout


def test_a_vulnerable_package_fails(osv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Osv, "vulnerable", "pillow")
    code, said = audit(osv)
    assert code == 1
    assert "TEST-1 (fixed: 999)" in said


def test_all_is_well(osv: str) -> None:
    code, said = audit(osv)
    assert code == 0
    assert said.endswith("packages, 0 with known vulnerabilities\n")


def test_what_was_not_audited_is_not_called_good() -> None:
    code, said = audit("http://127.0.0.1:1/")
    assert code == 0
    assert "NOTHING WAS AUDITED" in said
