"""The way to the published weights, through the real huggingface_hub, to a hub on loopback."""

import hashlib
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vit_builder
from conftest import BIN, GOLDENS
from vit_builder import hub

FILE = (GOLDENS / "tiny.pt").read_bytes()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The two calls that a download makes: what is in the repository, and the file."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith(f"/api/models/{hub.REPO}"):
            body = json.dumps({"id": hub.REPO, "sha": COMMIT, "siblings": []}).encode()
        elif self.path == f"/{hub.REPO}/resolve/main/{hub.NAME}.pt":
            body = FILE
        else:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub that serves the tiny checkpoint under the published name; the requests it got."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield server.requests  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_checked_and_kept_as_safetensors(
    requests: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sha256 = hashlib.sha256(FILE).hexdigest()
    monkeypatch.setattr(hub, "SHA256", (sha256,))
    first, found = hub.published()
    assert found == sha256
    assert first.name == hub.NAME
    assert any(path.endswith(".pt") for path in requests)
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert kept == tmp_path / "vit-builder" / sha256 / f"{hub.NAME}.safetensors"

    requests.clear()
    second, found = hub.published()
    assert (found, requests) == (sha256, [])  # no network the second time
    expected = vit_builder.load(GOLDENS / "tiny.pt")
    for checkpoint in (first, second):
        assert (checkpoint.config, checkpoint.labels) == (expected.config, expected.labels)
        for name, tensor in expected.state.items():
            torch.testing.assert_close(checkpoint.state[name], tensor, atol=0, rtol=0)


def test_another_file_under_the_name_is_refused(requests: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        hub.HubError, match=r"has the SHA-256 .* not one of those published: da47dc6b"
    ):
        hub.published()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def build(tmp_path: Path, weights: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "XDG_CACHE_HOME": str(tmp_path)}
    command = [BIN / "vit-builder", "--weights", weights, "--output", tmp_path / "m"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_weights_hub_fails_without_the_hub(tmp_path: Path) -> None:
    result = build(tmp_path, "hub")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"vit-builder: {hub.REPO}: ")
    assert "Connection refused" in result.stderr
    assert not (tmp_path / "m").exists()


def test_weights_auto_says_loudly_that_it_is_untrained(tmp_path: Path) -> None:
    result = build(tmp_path, "auto")
    assert result.returncode == 0, result.stderr
    assert "RANDOM weights" in result.stderr
    assert "Connection refused" in result.stderr
    report = json.loads((tmp_path / "m" / "build_report.json").read_text())
    assert report["weights"] == "random"
    assert 'string_value: "random"' in (tmp_path / "m" / "vit" / "config.pbtxt").read_text()
