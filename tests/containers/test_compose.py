"""docker/compose.yaml with the profiles `cpu` and `edge`, as docker/README.md has it.

In a copy: free ports, names of images and a build's arguments are the tests' own, and Grafana,
Jaeger and the collector are left out, since no stand-in would say more than the file's schema.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import GOLDENS, PHOTOS
from prometheus import Prometheus
from vit_client import AccessDenied, Client

from bench.edge import edge
from bench.ports import free_ports

from .bases import ROOT, Bases, envoy, prometheus
from .conftest import IMAGES
from .container import Container, wait_until_healthy
from .engine import TOKEN, Engine, run

PORTS = (8000, 8001, 8002, 8443, 9090)
LEFT_OUT = ("grafana", "collector", "jaeger")


@dataclass(frozen=True)
class Project:
    """A running Compose project."""

    compose: Callable[..., subprocess.CompletedProcess[str]]
    ports: dict[int, int]  # in the file, and in the copy
    tenants: edge.Tenants
    certificates: edge.Certificates
    docker: Engine

    def service(self, name: str) -> Container:
        container = self.compose("ps", "--quiet", name).stdout.strip()
        urls = [f"127.0.0.1:{self.ports[port]}" for port in (8001, 8000)]
        return Container(self.docker, container, *urls)


def changed(docker: Engine, built_on: Bases, ports: dict[int, int], door: Path) -> dict[str, Any]:
    """The copy, without `name:`, which docker-compose 1.29 does not know."""
    file: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    del file["name"]
    for service in LEFT_OUT:
        del file["services"][service]
    for name, stand_in in (("prometheus", prometheus), ("edge", envoy)):
        service = file["services"][name]
        service["image"] = stand_in(docker, service["image"], built_on)
    file["services"]["edge"]["volumes"] = [
        volume.replace("./edge", str(door)) for volume in file["services"]["edge"]["volumes"]
    ]
    images = {"vit-builder": IMAGES["builder"], "vit-server:cpu": IMAGES["cpu"]}
    for service in file["services"].values():
        service["image"] = images.get(service["image"], service["image"])
        if "build" in service:
            service["build"] |= {"network": "host", "args": built_on.args}
        published = [port.split(":")[-2:] for port in service.get("ports", [])]
        service["ports"] = [f"127.0.0.1:{ports[int(out)]}:{port}" for out, port in published]
    return file


@pytest.fixture(scope="module")
def project(
    docker: Engine,
    images: dict[str, str],
    built_on: Bases,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Project]:
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    words: list[object] = [docker.docker, "compose"]
    if docker("compose", "version", check=False).returncode:
        if not (found := shutil.which("docker-compose")):
            pytest.skip("no Compose: neither Docker's plugin nor docker-compose is installed")
        words = [found]
    door = tmp_path_factory.mktemp("edge") / "edge"
    shutil.copytree(edge.EDGE, door, ignore=shutil.ignore_patterns("tls"))
    tenants, certificates = edge.Tenants(), edge.Certificates(door / "tls")
    (door / "login.yaml").write_text(edge.login(tenants))
    (door / "tls" / "tls.key").chmod(0o644)  # Envoy is another user
    for folder in (door, *door.parents[:2]):
        folder.chmod(0o755)
    text = yaml.safe_dump(changed(docker, built_on, ports, door))
    words += ["--file=-", "--project-name", TOKEN]
    words += ["--profile", "cpu", "--profile", "edge"]
    # docker-compose builds with the first `docker` on the PATH.
    path = f"{Path(docker.docker).parent}:{os.environ['PATH']}"
    env = {**os.environ, **docker.env, "PATH": path, "VIT_WEIGHTS": "random"}

    def compose(*more: object) -> subprocess.CompletedProcess[str]:
        return run([*words, *more], env, 600, check=True, input=text, cwd=ROOT / "docker")

    try:
        compose("up", "--build", "--detach")
        yield Project(compose, ports, tenants, certificates, docker)
    finally:
        compose("down", "--volumes")


def test_up(project: Project) -> None:
    """Built, healthy, hardened, answering, and seen by Prometheus."""
    server = project.service("server-cpu")
    wait_until_healthy([server])
    with Client(server.url) as client:
        assert client.embed(PHOTOS / "coffee.jpg").shape == (512,)
    host = project.docker.inspect(server.name)["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["Init"]
    monitoring = Prometheus(f"http://127.0.0.1:{project.ports[9090]}")
    assert len(monitoring.wait('up{job="vit"}', lambda value: value == 1)) == 1


def test_the_edge(project: Project) -> None:
    """It finds the server by its name, and Prometheus finds it."""
    wait_until_healthy([project.service("server-cpu")])
    url, ca_file = f"grpcs://127.0.0.1:{project.ports[8443]}", project.certificates.ca_file
    with Client(url, token=project.tenants.token(), ca_file=ca_file) as client:
        assert client.embed(PHOTOS / "coffee.jpg").shape == (512,)
    with Client(url, ca_file=ca_file) as client, pytest.raises(AccessDenied):
        client.embed(PHOTOS / "coffee.jpg")
    monitoring = Prometheus(f"http://127.0.0.1:{project.ports[9090]}")
    assert len(monitoring.wait('up{job="vit-edge"}', lambda value: value == 1)) == 1
    container = project.service("edge")
    deadline = time.monotonic() + 30  # Envoy writes its log every ten seconds
    while '"tenant":"acme"' not in container.log():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert project.docker.inspect(container.name)["HostConfig"]["ReadonlyRootfs"]


def test_another_model(project: Project) -> None:
    """The README's row of that name."""
    my = f"{GOLDENS / 'tiny.pt'}:/my.pt:ro"
    builder = "vit-builder --output /repository/models --checkpoint /my.pt --device cpu"
    project.compose("run", "--rm", "-v", my, "model-cpu", builder)
    server = project.service("server-cpu")
    project.compose("restart", "server-cpu")
    server.wait_until_ready(times=2)
    with Client(server.url) as client:
        assert client.embed(PHOTOS / "coffee.jpg").shape == (64,)
    # It was stopped in good order: nothing was killed.
    assert "exit code" not in server.log()


def test_nothing_is_left(project: Project) -> None:
    """After `down -v`; the last test of this file."""
    project.compose("down", "--volumes")
    label = f"label=com.docker.compose.project={TOKEN}"
    for kind, every in (("container", ["--all"]), ("volume", []), ("network", [])):
        assert project.docker(kind, "ls", *every, "--quiet", "--filter", label).stdout == ""
