"""The images: their files against linter and schema, and what they run, run."""

import re
import subprocess
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BIN, Server
from container import DOCKER, container, copy, health

ROOT = DOCKER.parent
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
CLOSED = ("systemsharedmemory/status", "cudasharedmemory/status", "repository/index")
CLOSED += ("trace/setting", "logging")


def status(url: str, **headers: str) -> int:
    body = b"" if "index" in url else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as done:
            code: int = done.status
            return code
    except urllib.error.HTTPError as e:
        return e.code


def test_dockerfile_lint() -> None:
    subprocess.run([BIN / "hadolint", DOCKER / "Dockerfile"], check=True)


def test_dockerfile_sources_are_sent_to_the_engine() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in re.findall(r"^COPY docker/.*", dockerfile, re.M)]
    sources = {name for names in copied for name in names}
    sources |= set(re.findall(r"source=([^,]+)", dockerfile))
    sent = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in sent
    assert not any(fnmatch("models", pattern.lstrip("!")) for pattern in sent if pattern[0] == "!")


def test_what_is_installed_is_mounted_whole() -> None:
    """The builder and the server share files with other folders, by symbolic links."""
    dockerfile = (DOCKER / "Dockerfile").read_text()
    runs = re.findall(r"^RUN (?:.*\\\n)+.*", dockerfile, re.M)
    assert any("./server" in run for run in runs)
    for run in runs:
        mounted = [ROOT / source for source in re.findall(r"source=([^,]+)", run)]
        for link in (path for folder in mounted for path in folder.rglob("*") if path.is_symlink()):
            assert any(link.resolve().is_relative_to(folder) for folder in mounted), link


def test_compose_schema() -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    subprocess.run([BIN / "check-jsonschema", *schema, DOCKER / "compose.yaml"], check=True)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_service(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")  # there is no login
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (DOCKER / source).exists()
    if "build" in service:
        stages = re.findall(r"^FROM .* AS (\S+)$", (DOCKER / "Dockerfile").read_text(), re.M)
        assert service["build"]["target"] in stages
    else:
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])  # pinned


def test_health_of_a_healthy_server(tiny_server: Server) -> None:
    assert health(tiny_server.http_url) == (0, "")


def test_health_of_no_server() -> None:
    code, said = health("http://127.0.0.1:9")
    assert code == 1
    assert "Connection refused" in said


@pytest.mark.parametrize("dead", ["preprocess", "postprocess"])
def test_health_sees_a_dead_model_that_triton_does_not(tiny_repository: Path, dead: str) -> None:
    with container(tiny_repository) as server:
        assert health(server.http_url) == (0, "")
        server.kill_stub(dead)
        code, said = health(server.http_url)
        assert code == 1
        assert f"Stub process '{dead}_0_0' is not healthy" in said
        assert status(f"{server.http_url}/v2/health/ready") == 200


def test_health_sees_numbers_that_are_none(tiny_repository: Path, tmp_path: Path) -> None:
    repository = copy(tiny_repository, tmp_path)
    file = repository / "vit" / "1" / "model.pt"
    model = torch.jit.load(file)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    torch.jit.save(model, file)
    with container(repository) as server:
        code, said = health(server.http_url)
    assert code == 1
    assert said == "embed: embedding has numbers that are not finite\n"


def test_what_nobody_needs_is_closed(tiny_repository: Path, tiny_server: Server) -> None:
    with container(tiny_repository, VIT_ADMIN_KEY="secret") as server:
        for api in CLOSED:
            assert status(f"{server.http_url}/v2/{api}") == 403
            assert status(f"{tiny_server.http_url}/v2/{api}") == 403
            assert status(f"{server.http_url}/v2/{api}", **{"vit-admin-key": "wrong"}) == 403
        opened = f"{server.http_url}/v2/repository/index"
        assert status(opened, **{"vit-admin-key": "secret"}) == 200


def test_stops_when_it_is_told_to(tiny_repository: Path) -> None:
    """The shell script is gone: SIGTERM reaches tritonserver itself."""
    with container(tiny_repository) as server:
        assert Path(f"/proc/{server.process.pid}/exe").readlink().name == "tritonserver"
        server.process.terminate()
        assert server.process.wait(60) == 0
