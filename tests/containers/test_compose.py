"""docker/compose.yaml with the profile `cpu`, as docker/README.md has it.

In a copy: free ports, names of images and a build's arguments are the tests' own, and Grafana,
Jaeger and the collector are left out, since no stand-in would say more than the file's schema.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import GOLDENS, PHOTOS
from prometheus import Prometheus
from vit_client import Client

from bench.ports import free_ports

from .bases import ROOT, Bases, prometheus
from .conftest import IMAGES
from .container import Container, wait_until_healthy
from .engine import TOKEN, Engine, run

PORTS = (8000, 8001, 8002, 9090)
LEFT_OUT = ("grafana", "collector", "jaeger")


@dataclass(frozen=True)
class Project:
    """A running Compose project."""

    compose: Callable[..., subprocess.CompletedProcess[str]]
    ports: dict[int, int]  # in the file, and in the copy
    docker: Engine

    def service(self, name: str) -> Container:
        container = self.compose("ps", "--quiet", name).stdout.strip()
        urls = [f"127.0.0.1:{self.ports[port]}" for port in (8001, 8000)]
        return Container(self.docker, container, *urls)


def changed(docker: Engine, built_on: Bases, ports: dict[int, int]) -> dict[str, Any]:
    """The copy, without `name:`, which docker-compose 1.29 does not know."""
    file: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    del file["name"]
    for service in LEFT_OUT:
        del file["services"][service]
    monitoring = file["services"]["prometheus"]
    monitoring["image"] = prometheus(docker, monitoring["image"], built_on)
    images = {"vit-builder": IMAGES["builder"], "vit-server:cpu": IMAGES["cpu"]}
    for service in file["services"].values():
        service["image"] = images.get(service["image"], service["image"])
        if "build" in service:
            service["build"] |= {"network": "host", "args": built_on.args}
        published = [port.split(":") for port in service.get("ports", [])]
        service["ports"] = [f"{host}:{ports[int(out)]}:{port}" for host, out, port in published]
    return file


@pytest.fixture(scope="module")
def project(docker: Engine, images: dict[str, str], built_on: Bases) -> Iterator[Project]:
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    words: list[object] = [docker.docker, "compose"]
    if docker("compose", "version", check=False).returncode:
        if not (found := shutil.which("docker-compose")):
            pytest.skip("no Compose: neither Docker's plugin nor docker-compose is installed")
        words = [found]
    text = yaml.safe_dump(changed(docker, built_on, ports))
    words += ["--file=-", "--project-name", TOKEN]
    words += ["--profile", "cpu"]
    # docker-compose builds with the first `docker` on the PATH.
    path = f"{Path(docker.docker).parent}:{os.environ['PATH']}"
    env = {**os.environ, **docker.env, "PATH": path, "VIT_WEIGHTS": "random"}

    def compose(*more: object) -> subprocess.CompletedProcess[str]:
        return run([*words, *more], env, 600, check=True, input=text, cwd=ROOT / "docker")

    try:
        compose("up", "--build", "--detach")
        yield Project(compose, ports, docker)
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
