"""What the manifests run, run on this machine: their arguments, flags and scripts."""

import contextlib
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import BIN, GOLDENS, PHOTOS, Server, serving
from load import inputs, perf_analyzer
from ports import free_ports, front
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException
from vit_client import Client, Unavailable
from vit_server import cli, tritonserver

from . import rendered
from .rendered import FOLDER, ROOT, Object, find

KEY = "0123456789abcdef"


@dataclass(frozen=True)
class Pod:
    """A running server, by the arguments of its container."""

    grpc: int
    http: int

    def status(self, path: str, **headers: str) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}/v2/{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                code: int = response.status
                return code
        except urllib.error.HTTPError as e:
            return e.code


@contextlib.contextmanager
def running(objects: list[Object], repository: Path, folder: Path, **places: str) -> Iterator[Pod]:
    """The GPU server's container without its image: docker/serve.sh and the wheel's tritonserver.

    Args:
        places: files of the image or a volume, and where they are here.
    """
    _, container = rendered.server(objects)
    arguments = " ".join(container["args"])
    for there, here in {"/opt/vit/serve.sh": str(ROOT / "docker/serve.sh"), **places}.items():
        assert there in arguments
        arguments = arguments.replace(there, here)
    grpc, http, metrics = free_ports(3)
    arguments += f" --backend-directory={backends(folder)} --grpc-address=127.0.0.1"
    arguments += f" --grpc-port={grpc} --log-info=false --log-warning=false"
    prefix = f"manifests_{os.getpid()}_"
    arguments += f" --backend-config=python,shm-region-prefix-name={prefix}"
    installation = tritonserver.find()
    env = tritonserver.environment(installation)
    env["PATH"] = f"{installation.binary.parent}:{env['PATH']}"
    env |= {"MODEL_REPOSITORY": str(repository), "VIT_ADMIN_KEY": KEY}
    env |= front(http, metrics)
    with subprocess.Popen(arguments.split(), env=env) as process:
        try:
            pod = Pod(grpc, http)
            wait_until_ready(process, pod)
            yield pod
        finally:
            process.terminate()
            process.wait(60)
            for segment in Path("/dev/shm").glob(f"{prefix}*"):
                segment.unlink()


def backends(folder: Path) -> Path:
    """Triton's backends as they lie in an image."""
    installation = tritonserver.find()
    python = shutil.copytree(installation.python_backend, folder / "backends" / "python")
    shutil.copy(installation.stub, python)
    shutil.copytree(tritonserver.OUR_BACKENDS / "pytorch", folder / "backends" / "pytorch")
    return folder / "backends"


def wait_until_ready(process: "subprocess.Popen[bytes]", pod: Pod) -> None:
    """As the startup probe does."""
    while True:
        assert process.poll() is None, f"it ended with exit code {process.returncode}"
        with contextlib.suppress(OSError):
            if pod.status("health/ready") == 200:
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def test_gpu_overlay_serves(tiny_repository: Path, tmp_path: Path) -> None:
    objects = rendered.kustomize(FOLDER / "overlays/gpu")
    with running(objects, tiny_repository, tmp_path) as pod:
        assert pod.status("health/live") == 200
        with Client(f"127.0.0.1:{pod.grpc}") as client:
            assert client.embed(PHOTOS / "coffee.jpg").shape == (64,)
        # With the key of the Secret, and not without.
        settings = "trace/setting"
        assert pod.status(settings) == 403
        assert pod.status(settings, **{"vit-admin-key": "wrong"}) == 403
        assert pod.status(settings, **{"vit-admin-key": KEY}) == 200
        with InferenceServerClient(f"127.0.0.1:{pod.grpc}") as triton:
            with pytest.raises(InferenceServerException, match="restricted"):
                triton.get_model_repository_index()
            header = {"triton-grpc-protocol-vit-admin-key": KEY}
            assert len(triton.get_model_repository_index(headers=header).models) == 7
            with pytest.raises(InferenceServerException, match="explicit model load"):
                triton.unload_model("vit", headers=header)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """What the Secret vit-tls mounts: tls.crt for localhost, and tls.key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path / "secret"
    folder.mkdir()
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout tls.key -out tls.crt"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """For an overlay that a test puts together."""
    folder = tmp_path / "overlay"
    folder.mkdir()
    return folder


def test_tls_component_serves(
    tiny_repository: Path, tmp_path: Path, overlay: Path, secret: Path
) -> None:
    objects = rendered.composed(overlay, "overlays/gpu", "tls")
    with running(objects, tiny_repository, tmp_path, **{"/etc/vit/tls": str(secret)}) as pod:
        url = f"localhost:{pod.grpc}"
        with Client(f"grpcs://{url}", ca_file=secret / "tls.crt") as client:
            assert client.embed(PHOTOS / "coffee.jpg").shape == (64,)
        with Client(url, timeout=5) as client, pytest.raises(Unavailable):
            client.embed(PHOTOS / "coffee.jpg")


def test_tls_cpu_component_serves(tiny_repository: Path, overlay: Path, secret: Path) -> None:
    _, container = rendered.server(rendered.composed(overlay, "overlays/cpu", "tls-cpu"))
    places = {"/models": str(tiny_repository), "0.0.0.0": "127.0.0.1", "/etc/vit/tls": str(secret)}
    command, model_repository, *arguments = (_moved(a, places) for a in container["args"])
    assert (command, model_repository) == ("vit-server", f"--model-repository={tiny_repository}")
    with serving(tiny_repository, *arguments) as server:
        with Client(server.url, ca_file=secret / "tls.crt") as client:
            assert client.embed(PHOTOS / "coffee.jpg").shape == (64,)
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]["exec"]["command"]
            places = {"/opt/vit": str(ROOT / "docker"), "http://127.0.0.1:8000": server.http_url}
            moved = [_moved(word, places) for word in probe]
            if moved[-1].endswith("health.py"):
                moved.append(server.http_url)
            subprocess.run(moved, check=True, timeout=60)


def _moved(text: str, places: dict[str, str]) -> str:
    for there, here in places.items():
        text = text.replace(there, here)
    return text


def test_cpu_overlay_is_what_vit_server_takes() -> None:
    _, container = rendered.server(rendered.kustomize(FOLDER / "overlays/cpu"))
    command, *arguments = container["args"]
    assert command == "vit-server"
    args = cli._parser().parse_args(arguments)
    (mount,) = (
        m for m in container["volumeMounts"] if m["mountPath"] == str(args.model_repository)
    )
    assert mount["readOnly"] is True


@pytest.mark.parametrize("folder", ["overlays/gpu", "overlays/cpu", "kserve"])
def test_build_fills_what_is_served(folder: str, tmp_path: Path) -> None:
    """The builder's arguments, with a checkpoint at hand for the one on the hub."""
    objects = rendered.kustomize(FOLDER / folder)
    if folder == "kserve":
        objects = objects + rendered.kustomize(FOLDER / folder / "model")
    (build,) = (
        c
        for _, pod in rendered.pods(objects)
        for c in rendered.containers(pod)
        if c["name"] == "build"
    )
    (mount,) = (m["mountPath"] for m in build["volumeMounts"] if m["name"] == "models")
    arguments = " ".join(build["args"]).replace(mount, str(tmp_path))
    arguments = arguments.replace("--weights=hub", f"--checkpoint={GOLDENS / 'tiny.pt'}")
    subprocess.run([BIN / "vit-builder", *arguments.split()], check=True, capture_output=True)
    if folder == "kserve":
        predictor = find(objects, "InferenceService")["spec"]["predictor"]
        served = predictor["model"]["storageUri"].removeprefix("pvc://vit-models/")
    else:
        _, container = rendered.server(objects)
        (served,) = (m["subPath"] for m in container["volumeMounts"] if m["name"] == "models")
    assert (tmp_path / served / "build_report.json").is_file()


def test_load_job(tiny_server: Server, tmp_path: Path) -> None:
    (_, pod), *_ = rendered.pods(rendered.kustomize(FOLDER / "load"))
    prepare, measure = pod["initContainers"][0], pod["containers"][0]
    variables = {e["name"]: e["value"] for e in measure["env"]}
    images = tmp_path / "images.json"
    variables |= {"URL": tiny_server.url, "MODELS": "embed classify", "CONCURRENCY": "1 2"}
    variables |= {"INPUTS": str(images), "MILLISECONDS": "500"}
    script = measure["args"][0].replace("cd /tmp", f"cd {tmp_path}")

    subprocess.run([BIN / "python", "-c", *prepare["args"]], check=True, env=variables)
    wanted = tmp_path / "wanted.json"
    inputs.write_images(wanted, [p.read_bytes() for p in sorted(PHOTOS.glob("*.jpg"))])
    assert images.read_text() == wanted.read_text()

    binary = perf_analyzer.install()
    env = perf_analyzer._env(binary) | variables
    env["PATH"] = f"{binary.parent}:{env['PATH']}"
    command = [*measure["command"], script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines() if line]
    answers = [row for row in rows if row[0] != "Model"]
    assert [(row[0], row[1]) for row in answers] == [
        ("embed", "1"),
        ("embed", "2"),
        ("classify", "1"),
        ("classify", "2"),
    ]
    assert all(float(row[2]) > 0 for row in answers)

    env["URL"] = "127.0.0.1:9"  # nothing listens
    failed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert failed.returncode != 0
