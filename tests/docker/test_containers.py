"""The images: their files against linter and schema, and what they run, run."""

import ast
import re
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from conftest import BIN, PHOTOS, Server, at_each_batch, built, copy, start_and_fail
from nvidia import DOCKER, container, health, plain_triton, post, status
from processes import FREE_PORTS, segments, tritonserver, workspaces
from vit_client import Client
from vit_server.options import read

ROOT = DOCKER.parent
PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
COLLECTOR = yaml.safe_load((DOCKER / "tracing" / "collector.yaml").read_text())
INDEX = "repository/index"  # asked for with POST
CLOSED = ("systemsharedmemory/status", "cudasharedmemory/status", INDEX, "trace/setting", "logging")


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
        assert any(source == f or source.startswith(f"{f}/") for f in (s[1:] for s in sent))
    assert not any(fnmatch("models", pattern.lstrip("!")) for pattern in sent if pattern[0] == "!")


def test_targets_of_mounts_are_whole_paths() -> None:
    """buildah and podman take no others."""
    targets = re.findall(r"target=([^,\s]+)", (DOCKER / "Dockerfile").read_text())
    assert len(targets) > 5
    assert all(target.startswith("/src/") for target in targets)


def test_what_is_installed_is_mounted_whole() -> None:
    """The builder and the server share files with other folders, by symbolic links."""
    dockerfile = (DOCKER / "Dockerfile").read_text()
    runs = re.findall(r"^RUN (?:.*\\\n)+.*", dockerfile, re.M)
    assert any("./server" in run for run in runs)
    for run in runs:
        mounted = [ROOT / source for source in re.findall(r"source=([^,]+)", run)]
        for link in (path for folder in mounted for path in folder.rglob("*") if path.is_symlink()):
            assert any(link.resolve().is_relative_to(folder) for folder in mounted), link


def test_what_the_models_import_is_installed() -> None:
    """In NVIDIA's image there is what vit-server itself needs, and no torch."""
    imported = set()
    for path in (ROOT / "model_repository").glob("*/1/*.py"):
        siblings = {other.stem for other in path.parent.glob("*.py")}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {str(node.module).split(".")[0]}
            else:
                continue
            imported |= names - siblings - sys.stdlib_module_names
    imported -= {"triton_python_backend_utils"}
    wanted = {name.lower().replace("pil", "pillow") for name in imported}
    project = (ROOT / "server" / "pyproject.toml").read_text()
    needed = set(re.findall(r'"([\w-]+)', project.split("\ndependencies = [")[1].split("\n]")[0]))
    assert wanted <= needed
    assert not {"torch", "nvidia-pytriton"} & needed
    gpu = (DOCKER / "Dockerfile").read_text().split(" AS gpu\n")[1].split("\nFROM ")[0]
    assert "./server" in gpu
    assert "[embedded]" not in gpu


def test_compose_schema() -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    subprocess.run([BIN / "check-jsonschema", *schema, DOCKER / "compose.yaml"], check=True)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_service(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:") or name == "edge"  # nothing else has a login
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (DOCKER / source).exists()
    if "build" in service:
        stages = re.findall(r"^FROM .* AS (\S+)$", (DOCKER / "Dockerfile").read_text(), re.M)
        assert service["build"]["target"] in stages
        assert ("VIT_ADMIN_KEY" in service["environment"]) == name.startswith("server")
    else:
        assert re.search(r"[:-]v?\d+\.\d+\.\d+$", service["image"])  # pinned


def test_compose_traces_only_where_it_is_told() -> None:
    """And the collector passes them on to where they are looked at."""
    for name in ("server-cpu", "server-gpu"):
        command = [
            re.sub(r"\$\{\w+:-\}", "", word) for word in COMPOSE["services"][name]["command"]
        ]
        args, flags = read(command[1:])
        assert (args.otlp, args.trace_rate, flags) == ("", None, [])
    (exporter,) = COLLECTOR["exporters"].values()
    (name,) = re.fullmatch(r"\$\{env:(\w+)\}", exporter["endpoint"]).groups()
    backend = urlsplit(COMPOSE["services"]["collector"]["environment"][name]).hostname
    assert COMPOSE["services"][backend]["profiles"] == COMPOSE["services"]["collector"]["profiles"]


def test_compose_passes_on_what_the_readme_has_of_traces() -> None:
    table = re.findall(r"^\| `(OTEL_\w+)` \|", (DOCKER / "README.md").read_text(), re.M)
    for name in ("server-cpu", "server-gpu"):
        passed_on = COMPOSE["services"][name]["environment"]
        assert [word for word in passed_on if word.startswith("OTEL_")] == table


def test_collector_has_what_it_uses() -> None:
    (pipeline,) = COLLECTOR["service"]["pipelines"].values()
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) == set(COLLECTOR[kind])
    assert set(COLLECTOR["service"]["extensions"]) == set(COLLECTOR["extensions"])
    assert pipeline["processors"][0] == "memory_limiter"  # it must be the first


def test_health_of_a_healthy_server(tiny_server: Server) -> None:
    for options in ([], ["--live"]):
        assert health(tiny_server.http_url, *options) == (0, "")


def test_health_of_no_server() -> None:
    for options in ([], ["--live"]):
        code, said = health("http://127.0.0.1:9", *options)
        assert code == 1
        assert "Connection refused" in said


@pytest.mark.parametrize("dead", ["preprocess", "postprocess"])
def test_health_sees_a_dead_model_that_triton_does_not(tiny_repository: Path, dead: str) -> None:
    with plain_triton(tiny_repository) as server:
        assert health(server.http_url) == (0, "")
        server.kill_stub(dead)
        # As after a CUDA error that stays: each request is answered with an error, at once.
        for options in ([], ["--live"]):
            code, said = health(server.http_url, *options)
            assert code == 1
            assert f"Stub process '{dead}_0_" in said
        assert status(f"{server.http_url}/v2/health/ready") == 200


def test_health_sees_numbers_that_are_none(tiny_repository: Path, tmp_path: Path) -> None:
    repository = copy(tiny_repository, tmp_path)
    file = built(repository, "vit", "model.pt")
    model = torch.jit.load(file)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    torch.jit.save(model, file)
    with plain_triton(repository) as server:
        code, said = health(server.http_url)
    assert code == 1
    assert said == "embed: embedding has numbers that are not finite\n"


def test_a_plain_tritonserver_serves_the_repository(
    tiny_repository: Path, tiny_server: Server
) -> None:
    """Somebody's own Triton, or KServe's runtime: without vit-server, with the same numbers."""
    with plain_triton(tiny_repository) as server, Client(server.grpc_url) as client:
        photo = PHOTOS / "coffee.jpg"
        with Client(tiny_server.url) as ours:
            assert (client.embed(photo) == ours.embed(photo)).all()
            assert client.classify(photo) == ours.classify(photo)


@pytest.mark.parametrize(
    ("variable", "key", "opened"), [("secret\n", "secret", 200), ("", "", 403)]
)
def test_what_nobody_needs_is_closed(
    tiny_repository: Path, tiny_server: Server, variable: str, key: str, opened: int
) -> None:
    with container(tiny_repository, VIT_ADMIN_KEY=variable) as server:
        for api in CLOSED:
            body = b"" if api == INDEX else None
            assert status(f"{server.http_url}/v2/{api}", body) == 403
            assert status(f"{tiny_server.http_url}/v2/{api}", body) == 403
            assert status(f"{server.http_url}/v2/{api}", body, **{"vit-admin-key": "wrong"}) == 403
        asked = status(f"{server.http_url}/v2/{INDEX}", b"", **{"vit-admin-key": key})
        assert asked == opened


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_when_it_is_told_to(tiny_repository: Path, number: signal.Signals) -> None:
    with container(tiny_repository) as server:
        pid = server.process.pid
        server.process.send_signal(number)
        assert server.process.wait(60) == 0
        assert not segments(pid)
        assert not workspaces(pid)


def test_flags_are_passed_on(tiny_repository: Path) -> None:
    with container(tiny_repository, "--", "--metrics-interval-ms=60000", "--log-info=1") as server:
        command = Path(f"/proc/{tritonserver(server.process.pid)}/cmdline").read_text()
        assert command.split("\0")[-3:-1] == ["--metrics-interval-ms=60000", "--log-info=1"]
        server.process.terminate()
        assert "Found 0 live models" in server.process.communicate()[1]


OURS = "cannot be passed to tritonserver: vit-server sets"
HELP = "vit-server -- --help lists its flags"


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--grpc-port=1", f"--grpc-port {OURS} --grpc-port"),
        ("--http-por=1", f"--http-por {OURS} --http-port"),
        ("--model-s=/tmp", f"--model-s {OURS} --model-store"),
        ("--allow-http=false", f"--allow-http {OURS} --allow-http"),
        ("--grpc-use-ssl=1", f"--grpc-use-ssl {OURS} --grpc-use-ssl"),
        ("--what=1", f"tritonserver: unrecognized option '--what=1'; {HELP}"),
        ("-x", f"tritonserver: invalid option -- 'x'; {HELP}"),
        ("--log-info", f"tritonserver: option '--log-info' requires an argument; {HELP}"),
        (
            "--buffer-manager-thread-count=many",
            "tritonserver exited with code 1: Invalid option value. Got many",
        ),
        ("what", "tritonserver exited with code 1: Unexpected argument: what"),
    ],
)
def test_flags_that_are_not(tiny_repository: Path, flag: str, sentence: str) -> None:
    assert start_and_fail(tiny_repository, *FREE_PORTS, "--", flag) == f"vit-server: {sentence}"


def test_flags_are_told() -> None:
    command = [BIN / "vit-server", "--", "--help"]
    assert "--exit-timeout-secs <integer>" in subprocess.check_output(command, text=True)


@pytest.mark.parametrize("key", ["two words", "€"])
def test_key_that_no_header_can_have(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("VIT_ADMIN_KEY", key)
    said = start_and_fail(tiny_repository, *FREE_PORTS)
    sentence = "VIT_ADMIN_KEY must consist of visible ASCII characters, without spaces"
    assert said == f"vit-server: {sentence}"


def test_an_incomplete_tritonserver(tiny_repository: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for missing in ("bin/tritonserver", "backends/python", "backends/pytorch"):
        said = start_and_fail(tiny_repository, "--tritonserver", str(tmp_path))
        assert said.startswith(f"vit-server: {tmp_path} has no {missing}: a tritonserver ")
        (tmp_path / missing).mkdir(parents=True)


def test_health_of_a_busy_server(tiny_repository: Path, tmp_path: Path) -> None:
    """A probe that waits for longer than it can, behind others that are answered."""
    with (
        plain_triton(at_each_batch(tiny_repository, tmp_path, "time.sleep(4)")) as server,
        ThreadPoolExecutor(125) as askers,
    ):
        embed = f"{server.http_url}/v2/models/embed/infer"
        asked = [askers.submit(post, embed, PHOTO) for _ in range(125)]
        waiting = re.compile(r'pending_request_count{model="preprocess",[^}]*} (\d+)')
        for _ in range(100):
            with urllib.request.urlopen(server.metrics_url, timeout=30) as metrics:
                if int(waiting.findall(metrics.read().decode())[0]) > 96:  # 3 turns of 2 x 16
                    break
            time.sleep(0.1)
        else:
            pytest.fail("the queue never filled")
        start = time.monotonic()
        assert health(server.http_url) == (0, "")
        assert time.monotonic() - start > 10  # it gave up waiting
        assert {answer.result() for answer in asked} == {200}


def test_health_of_a_hung_server(tiny_repository: Path, tmp_path: Path) -> None:
    with plain_triton(at_each_batch(tiny_repository, tmp_path, "time.sleep(1000)")) as server:
        assert health(server.http_url) == (1, "embed: no answer in 10 s, to anybody\n")
        assert health(server.http_url, "--live") == (0, "")


def test_no_body_ends_it(tiny_repository: Path) -> None:
    """More of them in tests/reliability/test_bodies.py; it is the same HTTP."""
    with container(tiny_repository) as server:
        embed = f"{server.http_url}/v2/models/embed/infer"
        assert post(embed, bytes(20_000_000)) == 400  # as a form, as urllib and curl say
        assert post(server.metrics_url, bytes(20_000_000)) == 405
        assert post(embed, bytes(70_000_000)) == 413
        assert post(embed, PHOTO) == 200
