"""What docker/README.md promises of a running container, in a real engine."""

import http.client
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import BIN, PHOTOS
from vit_client import Client, Unavailable, VitClientError

from .conftest import IMAGES
from .container import Container, container, wait_until_healthy
from .engine import Engine

PHOTO = PHOTOS / "coffee.jpg"
Images = dict[str, str]
SERVERS = [IMAGES["cpu"], IMAGES["gpu"]]
both = pytest.mark.parametrize("image", SERVERS, ids=["cpu", "gpu"])


def test_healthy_hardened_and_answering(
    docker: Engine, images: Images, network: str, tiny: Path
) -> None:
    with (
        container(docker, network, SERVERS[0], tiny) as cpu,
        container(docker, network, SERVERS[1], tiny) as gpu,
        container(docker, network, IMAGES["cpu-baked"], None) as baked,
    ):
        for one in (cpu, gpu, baked):
            one.wait_until_ready()
            ask = [BIN / "vit-client", "classify", PHOTO, "--json", "--url", one.url]
            assert '"score"' in subprocess.check_output(ask, text=True, timeout=60)
            status = one.python("print(open('/proc/1/status').read())")
            fields = dict(line.split(":\t") for line in status.splitlines())
            assert fields["Uid"].split() == ["1000"] * 4
            assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
            assert "Read-only" in one.python("try: open('/x', 'w')\nexcept OSError as e: print(e)")
        with Client(cpu.url) as one, Client(gpu.url) as other:
            assert (one.embed(PHOTO) == other.embed(PHOTO)).all()
        wait_until_healthy([cpu, gpu, baked])


@both
@pytest.mark.parametrize("victim", ["/preprocess/", "bin/tritonserver"])
def test_what_was_killed_comes_back(
    docker: Engine, images: Images, network: str, tiny: Path, image: str, victim: str
) -> None:
    with container(docker, network, image, tiny, "--restart=unless-stopped") as server:
        server.wait_until_ready()
        server.kill(victim)
        server.wait_until_ready(times=2)
        assert docker.inspect(server.name)["RestartCount"] == 1
        with Client(server.url, timeout=60) as client:
            assert client.embed(PHOTO).shape == (64,)


@both
def test_nothing_accepted_is_lost(
    docker: Engine, images: Images, network: str, tiny: Path, image: str
) -> None:
    """At `docker stop`, also beside an HTTP connection that says nothing."""
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    told = threading.Event()
    ended = threading.Event()
    photos = [PHOTO.read_bytes()] * 8

    def ask(task: str) -> None:
        with Client(server.url, retries=0, timeout=60) as client:
            while not ended.is_set():
                in_time = not told.is_set()
                try:
                    getattr(client, task)(photos)
                    outcome = "answered"
                except Unavailable:
                    outcome = "Unavailable"
                    time.sleep(0.1)
                except VitClientError as e:
                    outcome = str(e)
                (before if in_time else after)[outcome] += 1

    with container(docker, network, image, tiny, "--init", "--cap-drop=ALL") as server:
        server.wait_until_ready()
        idle = http.client.HTTPConnection(server.http_url.removeprefix("http://"), timeout=60)
        idle.request("GET", "/v2/health/ready")
        idle.getresponse().read()
        askers = [
            threading.Thread(target=ask, args=(task,))
            for task in ("classify", "probabilities", "embed", "features", "analyze") * 4
        ]
        for asker in askers:
            asker.start()
        while sum(before.values()) < 100:
            time.sleep(0.1)
        # Those that are sent now are on their way; the signal comes with the command, later.
        told.set()
        docker("stop", server.name)
        ended.set()
        for asker in askers:
            asker.join()
        idle.close()
        assert server.state["ExitCode"] == 0
        assert not server.state["OOMKilled"]
    print(image, dict(before), dict(after))
    assert set(before) == {"answered"}
    assert set(after) <= {"answered", "Unavailable"}


@both
@pytest.mark.parametrize("init", [(), ("--init",)], ids=["", "init"])
def test_stopped_while_loading(
    docker: Engine, images: Images, network: str, tiny: Path, image: str, init: tuple[str, ...]
) -> None:
    with container(docker, network, image, tiny, *init) as server:
        while "Starting tritonserver" not in server.log():
            assert server.state["Running"]
        docker("stop", server.name)
        assert server.state["ExitCode"] == 0
        assert "Ready" not in server.log()


def sentence(server: Container) -> str:
    """All that it said of its end, which is one line."""
    code = server.wait_until_ended()
    log = server.log()
    assert "Traceback" not in log
    said = [line for line in log.splitlines() if line.startswith("vit-server: ")]
    assert code == 1, log
    assert len(said) == 1, log
    return said[0]


@both
def test_one_core(docker: Engine, images: Images, network: str, tiny: Path, image: str) -> None:
    with container(docker, network, image, tiny, "--cpus=1") as server:
        server.wait_until_ready()
        cores = "from vit_server import installation; print(installation.cores())"
        assert server.python(cores) == "1"
        with Client(server.url) as client:
            assert client.embed([PHOTO] * 16).shape == (16, 64)


def test_tmp_without_exec(docker: Engine, images: Images, network: str, tiny: Path) -> None:
    flags = ("--read-only", "--tmpfs", "/tmp", "--shm-size", "1g")
    with container(docker, network, SERVERS[0], tiny, hardening=flags) as server:
        assert sentence(server).startswith("vit-server: /tmp is mounted noexec")
    # NVIDIA's backends lie in its image.
    with container(docker, network, SERVERS[1], tiny, hardening=flags) as server:
        server.wait_until_ready()


@both
def test_no_tmp(docker: Engine, images: Images, network: str, tiny: Path, image: str) -> None:
    flags = ("--read-only", "--shm-size", "1g")
    with container(docker, network, image, tiny, hardening=flags) as server:
        assert sentence(server).startswith("vit-server: /tmp cannot be written")


@both
def test_full_tmp(docker: Engine, images: Images, network: str, tiny: Path, image: str) -> None:
    flags = ("--read-only", "--tmpfs", "/tmp:exec,size=100k", "--shm-size", "1g")
    with container(docker, network, image, tiny, hardening=flags) as server:
        assert "No space left on device" in sentence(server)


@both
def test_shm_too_small(
    docker: Engine, images: Images, network: str, tiny: Path, image: str
) -> None:
    with container(docker, network, image, tiny, "--shm-size=100m") as server:
        said = sentence(server)
        assert "/dev/shm" in said or "shared memory" in said


@both
def test_repository_that_cannot_be_read(
    docker: Engine, images: Images, network: str, tmp_path: Path, image: str
) -> None:
    tmp_path.chmod(0o700)
    with container(docker, network, image, tmp_path, "--user=4321:4321") as server:
        assert "cannot be read" in sentence(server)


@both
def test_another_uid(docker: Engine, images: Images, network: str, tiny: Path, image: str) -> None:
    """As OpenShift chooses one."""
    with container(docker, network, image, tiny, "--user=4321:0", "--cap-drop=ALL") as server:
        server.wait_until_ready()
        with Client(server.url) as client:
            assert client.embed(PHOTO).shape == (64,)


@both
@pytest.mark.parametrize("megabytes", [2000, 300, 150])
def test_memory_limits(
    docker: Engine, images: Images, network: str, tiny: Path, image: str, megabytes: int
) -> None:
    with container(docker, network, image, tiny, f"--memory={megabytes}m") as server:
        if megabytes == 2000:
            server.wait_until_ready()
            return
        said = sentence(server)
        assert "; the memory limit was reached: the kernel killed " in said
        assert server.state["OOMKilled"]
