"""What the manifests run, run on this machine: their arguments, flags and scripts."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import BIN, GOLDENS, PHOTOS, Server, serving
from nvidia import container, status
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException
from vit_client import Client, Unavailable
from vit_server import options

from bench.load import inputs, perf_analyzer

from . import rendered
from .rendered import FOLDER, ROOT, Object, find

KEY = "0123456789abcdef"


@contextlib.contextmanager
def running(
    objects: list[Object], repository: Path, **places: str
) -> Iterator[tuple[Server, Object]]:
    """A pod's server by the arguments of its container, and what that container is.

    Args:
        places: files of a volume, and where they are here.
    """
    _, pod = rendered.server(objects)
    places |= {"/models": str(repository), "0.0.0.0": "127.0.0.1"}
    command, model_repository, *arguments = (_moved(a, places) for a in pod["args"])
    assert (command, model_repository) == ("vit-server", f"--model-repository={repository}")
    on_gpu = "nvidia.com/gpu" in pod["resources"]["limits"]
    # The Secret of the administrators is optional; the embedded server is tried without.
    start = partial(container, VIT_ADMIN_KEY=KEY) if on_gpu else serving
    with start(repository, *arguments) as server:
        yield server, pod


def test_gpu_overlay_serves(tiny_repository: Path) -> None:
    with running(rendered.kustomize(FOLDER / "overlays/gpu"), tiny_repository) as (server, _):
        assert status(f"{server.http_url}/v2/health/live") == 200
        with Client(server.url) as client:
            assert client.embed(PHOTOS / "coffee.jpg").shape == (64,)
        # With the key of the Secret, and not without.
        settings = f"{server.http_url}/v2/trace/setting"
        assert status(settings) == 403
        assert status(settings, **{"vit-admin-key": "wrong"}) == 403
        assert status(settings, **{"vit-admin-key": KEY}) == 200
        with InferenceServerClient(server.url) as triton:
            with pytest.raises(InferenceServerException, match="restricted"):
                triton.get_model_repository_index()
            header = {"triton-grpc-protocol-vit-admin-key": KEY}
            assert len(triton.get_model_repository_index(headers=header).models) == 9
            with pytest.raises(InferenceServerException, match="not allowed if polling is enabled"):
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


@pytest.mark.parametrize("base", ["overlays/gpu", "overlays/cpu"])
def test_tls_component_serves(
    tiny_repository: Path, overlay: Path, secret: Path, base: str
) -> None:
    objects = rendered.composed(overlay, base, "tls")
    moved = {"/etc/vit/tls": str(secret)}
    with running(objects, tiny_repository, **moved) as (server, container):
        with Client(server.url, ca_file=secret / "tls.crt") as client:
            assert client.embed(PHOTOS / "coffee.jpg").shape == (64,)
        plain = server.url.replace("grpcs://", "")
        with Client(plain, timeout=5) as client, pytest.raises(Unavailable):
            client.embed(PHOTOS / "coffee.jpg")
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[name]["exec"]["command"]
            places = {"/opt/vit": str(ROOT / "docker"), "http://127.0.0.1:8000": server.http_url}
            command = [_moved(word, places) for word in probe]
            if "health.py" in " ".join(command):
                command.append(server.http_url)
            subprocess.run(command, check=True, timeout=60)


def _moved(text: str, places: dict[str, str]) -> str:
    for there, here in places.items():
        text = text.replace(there, here)
    return text


@pytest.mark.parametrize("folder", ["overlays/gpu", "overlays/cpu", "kserve"])
def test_arguments_are_what_vit_server_takes(folder: str) -> None:
    _, container = rendered.server(rendered.kustomize(FOLDER / folder))
    command, *arguments = container["args"]
    assert command == "vit-server"
    args, _ = options.read(arguments)
    if folder == "kserve":
        assert str(args.model_repository) == "/mnt/models"  # where KServe mounts it
        return
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
