"""vit-server as a process: how it starts, what it says when it cannot, what it leaves."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import vit_builder
from conftest import (
    BIN,
    GOLDENS,
    PHOTOS,
    Server,
    at_each_batch,
    built,
    copy,
    serving,
    start_and_fail,
)
from google.protobuf import text_format
from ports import wait_for
from processes import (
    FREE_PORTS,
    descendants,
    environments,
    gone,
    listening,
    model_process,
    model_processes,
    segments,
    started,
    tritonserver,
    with_mounts,
    workspaces,
)
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc.model_config_pb2 import ModelConfig
from vit_server import repository, sizing
from vit_server.probe import ENSEMBLES

from bench.ports import free_ports

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()


# Root may read everything, without these two.
WITHOUT_OVERRIDES = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def test_it_listens_where_it_says_and_nowhere_else(tiny_server: Server) -> None:
    assert tiny_server.url.startswith("127.0.0.1:")
    with urllib.request.urlopen(tiny_server.metrics_url, timeout=10) as response:
        assert "nv_inference_count" in response.read().decode()
    with urllib.request.urlopen(f"{tiny_server.http_url}/v2/health/ready", timeout=10) as response:
        assert response.status == 200
    addresses = listening(tiny_server.process.pid)
    assert {address for _, address in addresses} == {"127.0.0.1"}
    assert len(addresses) == 5  # HTTP and metrics are passed on to tritonserver's own


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port", "--metrics-port"])
def test_port_in_use(tiny_repository: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = start_and_fail(tiny_repository, *FREE_PORTS, flag, port)
    assert f"port {port}: Address already in use" in said
    assert flag in said


def test_port_of_another_vit_server(tiny_repository: Path, tiny_server: Server) -> None:
    """gRPC shares ports silently (SO_REUSEPORT): no second server may take half the requests."""
    port = tiny_server.url.rpartition(":")[2]
    assert "Address already in use" in start_and_fail(
        tiny_repository, *FREE_PORTS, "--grpc-port", port
    )


def test_files_of_the_current_folder_are_no_modules(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's `token`, `types` and the like are imported by torch and numpy."""
    for name in ("token", "types", "numpy", "decode"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the current folder')\n")
    monkeypatch.chdir(tmp_path)
    with serving(tiny_repository) as server:
        assert server.infer("classify", "image", [PHOTO])["scores"].shape == (1, 12)


def test_free_ports_stay_reserved_until_triton_listens(tiny_repository: Path) -> None:
    """Loading the models takes seconds, in which others look for free ports too."""
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        ports: list[str] = []
        while not ports:
            assert process.poll() is None
            with suppress(ValueError, OSError):  # there is no tritonserver yet
                flags = Path(f"/proc/{tritonserver(process.pid)}/cmdline").read_text()
                ports = re.findall(r"--(?:grpc|http|metrics)-port=(\d+)", flags)
        assert len(ports) == 3
        for port in map(int, ports):
            with socket.socket() as other, pytest.raises(OSError, match="already in use"):
                other.bind(("127.0.0.1", port))
        assert any(line.startswith("Ready") for line in process.stdout or ())
        process.terminate()
    assert process.returncode == 0


def test_two_at_once_on_the_same_ports(tiny_repository: Path) -> None:
    """Whichever loses must not take the other's answers for its own."""
    grpc, http, metrics = map(str, free_ports(3))
    ports = ["--grpc-port", grpc, "--http-port", http, "--metrics-port", metrics]
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *ports]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    while all(process.poll() is None for process in both):
        time.sleep(0.1)
    loser, winner = sorted(both, key=lambda process: process.poll() is None)
    said, why = loser.communicate(timeout=60)
    assert loser.returncode == 1
    assert "Ready" not in said
    assert "in use" in why.splitlines()[-1]
    assert winner.stdout is not None
    assert any(line.startswith("Ready") for line in winner.stdout)
    winner.terminate()
    winner.communicate(timeout=60)
    assert winner.returncode == 0


def test_nobody_reads_what_it_prints(tiny_repository: Path) -> None:
    (http,) = free_ports(1)
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    command += ["--http-port", str(http)]
    reader, writer = os.pipe()
    os.close(reader)
    with started(command, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        try:
            wait_for(f"http://127.0.0.1:{http}/v2/health/ready", process, seconds=60)
            time.sleep(3)  # it asks every model, and then prints
        finally:
            process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "Exception" not in errors


def test_nobody_can_have_what_it_says(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with serving(tiny_repository, under=["sh", "-c", 'exec "$@" 2> /dev/full', "sh"]) as server:
        server.process.terminate()
        assert server.process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--host", "example.com"), "example.com is not an IP address"),
        (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1"),
        (("--grpc-port", "70000"), "70000 is not a port"),
        (("--grpc-port", "9901", "--http-port", "9901"), "must differ"),
    ],
)
def test_wrong_arguments(tiny_repository: Path, arguments: tuple[str, ...], sentence: str) -> None:
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode not in (0, -9)
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_no_repository(tmp_path: Path) -> None:
    assert "no such model repository" in start_and_fail(tmp_path / "nothing")
    assert "no build_report.json; run vit-builder to create it" in start_and_fail(
        PHOTOS.parent / "model_repository"
    )


def seal(repository: Path) -> None:
    """Have the report say that model.pt and the labels, as they are, are what was built."""
    report = json.loads((repository / "build_report.json").read_text())
    for name in report["sha256"]:
        report["sha256"][name] = hashlib.sha256((repository / name).read_bytes()).hexdigest()
    (repository / "build_report.json").write_text(json.dumps(report))


def spoil_model(repository: Path) -> None:
    built(repository, "vit", "model.pt").write_bytes(b"PK\x03\x04 cut short")
    seal(repository)


def spoil_labels(repository: Path) -> None:
    built(repository, "postprocess", "labels.txt").write_text("only one\n")
    seal(repository)


def spoil_config(repository: Path) -> None:
    (repository / "embed" / "config.pbtxt").write_text('name: "embed" max_batch_size: many')


def spoil_own_config(repository: Path) -> None:
    """One that vit-server reads itself."""
    (repository / "preprocess" / "config.pbtxt").write_text("max_batch_size: many")


def spoil_code(repository: Path) -> None:
    built(repository, "preprocess", "model.py").write_text("import antigravity_two")


def spoil_output(repository: Path) -> None:
    """A config that the file does not fulfil: Triton itself never checks that."""
    path = repository / "vit" / "config.pbtxt"
    path.write_text(path.read_text().replace("embedding__1", "embedding__7"))
    path = repository / "embed" / "config.pbtxt"
    path.write_text(path.read_text().replace("embedding__1", "embedding__7"))


def spoil_folder(repository: Path) -> None:
    """Git and zip drop empty folders."""
    shutil.rmtree(built(repository, "embed"))


def spoil_shape(repository: Path) -> None:
    path = repository / "vit" / "config.pbtxt"
    path.write_text(path.read_text().replace("dims: 12", "dims: 13"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_model, "the model 'vit' failed to load: .*PytorchStreamReader"),
        (spoil_labels, "classify is loaded but its requests fail: .*top_indices must be in"),
        (spoil_config, "'embed' failed to load: .* proto from {repository}/embed/config.pbtxt"),
        (spoil_own_config, "vit-server: {repository}/preprocess/config.pbtxt: 1:17 "),
        (spoil_code, "the model 'preprocess' failed to load: .*antigravity_two"),
        (spoil_folder, r"no embed/\d+; build it again with vit-builder$"),
        (spoil_shape, "in ensemble .*inconsistent shape"),
        (spoil_output, "the network failed: tuple index out of range$"),
    ],
)
def test_model_that_fails(
    tiny_repository: Path, tmp_path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    repository = tmp_path / "models"
    shutil.copytree(tiny_repository, repository)
    spoil(repository)
    said = start_and_fail(repository, *FREE_PORTS)
    assert re.search(sentence.format(repository=repository), said), said


class OneAtATime(torch.nn.Module):
    """A network that fails with any larger batch, as on a GPU without the memory for it."""

    def __init__(self, network: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> Any:
        if pixels.size(0) > 1:
            raise RuntimeError("no memory for so many")
        return self.network(pixels)


def test_warm_up_that_fails(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends Triton by a signal, while other models still load, and mostly without a word."""
    repository = copy(tiny_repository, tmp_path)
    path = str(built(repository, "vit", "model.pt"))
    torch.jit.save(torch.jit.script(OneAtATime(torch.jit.load(path))), path)
    seal(repository)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # with more a batch is split
    command = [BIN / "vit-server", "--model-repository", repository, *FREE_PORTS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    _, crash, _, reason = result.stderr.splitlines()
    assert re.match("vit-server: tritonserver exited with code 1(34|39): .*without war", crash)
    assert reason == (
        "vit-server: embed is loaded but its requests fail: in ensemble 'embed', "
        "the network failed: builtins.RuntimeError: no memory for so many"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", "4,3,2"),  # as OpenMP takes them
        ("OMP_NUM_THREADS", " 1 "),
        ("AIP_MODE", "PREDICTION"),  # Triton would serve Vertex AI, and neither gRPC nor HTTP
        ("AIP_HTTP_PORT", "many"),
    ],
)
def test_environment_that_it_bears(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with serving(tiny_repository) as server:
        assert server.infer("classify", "image", [PHOTO])["scores"].shape == (1, 12)


@pytest.mark.parametrize("threads", ["four", "0", "2,,1", "-1"])
def test_threads_that_openmp_does_not_take(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    said = start_and_fail(tiny_repository, *FREE_PORTS)
    assert f": OMP_NUM_THREADS={threads} is neither a number of threads nor" in said


@pytest.mark.alone
def test_it_leaves_alone_what_other_servers_have_made(tiny_repository: Path) -> None:
    with serving(tiny_repository) as first, serving(tiny_repository, errors=True) as second:
        before = environments()
        os.kill(tritonserver(first.process.pid), signal.SIGKILL)  # so its folders stay
        assert first.process.wait(60) == 137
        assert len(before - environments()) == 2
        assert second.infer("classify", "image", [PHOTO])["scores"].shape == (1, 12)
        second.process.terminate()
        _, errors = second.process.communicate(timeout=60)
        assert second.process.returncode == 0
        assert len(errors.splitlines()) == 2, errors  # that it starts, and that it stops


def cores(*files: tuple[str, str]) -> int:
    """As vit-server counts them, with these files in /sys/fs/cgroup."""
    lines = ["mount -t tmpfs tmpfs /sys/fs/cgroup", "mkdir /sys/fs/cgroup/cpu"]
    lines += [f"echo {text} > /sys/fs/cgroup/{name}" for name, text in files]
    code = "from vit_server import installation; print(installation.cores())"
    command = [*with_mounts(" && ".join(lines)), BIN / "python", "-c", code]
    return int(subprocess.check_output(command, text=True))


@pytest.mark.parametrize(
    ("cores", "count", "threads", "naming"),
    [
        (1, 2, 1, 1),
        (2, 2, 2, 1),
        (4, 2, 4, 1),
        (6, 2, 6, 1),
        (8, 3, 4, 1),
        (16, 6, 4, 2),
        (64, 22, 4, 8),
    ],
)
def test_processes_and_threads_for_some_cores(
    cores: int, count: int, threads: int, naming: int
) -> None:
    assert sizing.processes(cores, 110_000_000, memory=1 << 40, shm=1 << 40) == count
    assert sizing.threads(cores, count) == threads
    assert sizing.naming(count) == naming


def test_no_more_processes_than_there_is_memory_for() -> None:
    """As on a machine of 64 cores, with the limits of compose.yaml."""
    assert sizing.processes(64, 110_000_000, memory=8 << 30, shm=1 << 40) == 2
    assert sizing.processes(64, 110_000_000, memory=32 << 30, shm=1 << 40) == 9
    assert sizing.processes(64, 110_000_000, memory=1 << 40, shm=1 << 30) == 5
    assert sizing.processes(64, 110_000_000, memory=1 << 40, shm=64 << 20) == 2


@pytest.mark.parametrize(
    ("by_hand", "count", "threads"),
    [
        ({}, 3, "4"),
        ({"count: 2": "count: 1"}, 1, "8"),
        ({"count: 2": "count: 5"}, 5, "2"),
        ({'"auto"': '"6"'}, 2, "6"),
        ({'"auto"': '"6"', "count: 2": "count: 4"}, 4, "6"),
        ({'key: "threads"': 'key: "other"'}, 2, ""),  # as an older builder wrote it
    ],
)
def test_processes_that_somebody_has_set_stand(
    tiny_repository: Path, tmp_path: Path, by_hand: dict[str, str], count: int, threads: str
) -> None:
    models = of_small_images(tiny_repository, tmp_path)
    file = models / "preprocess" / "config.pbtxt"
    for before, after in by_hand.items():
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after))
    repository.fit(models, cores=8)
    config = text_format.Parse(file.read_text(), ModelConfig())
    assert [group.count for group in config.instance_group] == [count]
    assert config.parameters["threads"].string_value == threads


@pytest.mark.parametrize(("by_hand", "count"), [("count: 1", 2), ("count: 5", 5)])
def test_postprocess_follows_preprocess_unless_somebody_has_set_it(
    tiny_repository: Path, tmp_path: Path, by_hand: str, count: int
) -> None:
    models = of_small_images(tiny_repository, tmp_path)
    file = models / "postprocess" / "config.pbtxt"
    assert "count: 1" in file.read_text()
    file.write_text(file.read_text().replace("count: 1", by_hand))
    repository.fit(models, cores=16)
    assert repository.processes(models, "postprocess") == count


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_that_sees_no_gpu_does_not_stand_in_for_one(tiny_repository: Path) -> None:
    """As vit-server starts it for a GPU that the driver has, and a torch without CUDA."""
    said = start_and_fail(tiny_repository, *FREE_PORTS, under=["env", "VIT_DEVICE=cuda"])
    assert f"built for a GPU, and torch {torch.__version__} sees none" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_built_for_a_gpu_is_not_served_without_one(tmp_path: Path) -> None:
    """Triton would take the CPU, in fp16, and be ready."""
    models = tmp_path / "models"
    settings = vit_builder.Settings("fp16", max_batch_size=64, top_k=12, device="cuda")
    vit_builder.build(vit_builder.load(GOLDENS / "tiny.pt"), settings, models)
    vit, preprocess = (
        text_format.Parse((models / name / "config.pbtxt").read_text(), ModelConfig())
        for name in ("vit", "preprocess")
    )
    (group,) = vit.instance_group
    assert (group.kind, group.count) == (group.KIND_GPU, 2)
    assert preprocess.parameters["max_waiting_images"].string_value == "64"
    assert re.fullmatch(
        "vit-server: the model repository was built for a GPU, but (there is no|CUDA) .*"
        "; to serve it on a CPU, build it with vit-builder --device cpu",
        start_and_fail(models, *FREE_PORTS),
    )


def test_repository_that_may_only_be_read(tiny_repository: Path, tmp_path: Path) -> None:
    models = copy(tiny_repository, tmp_path)
    for file in models.rglob("*.*"):
        file.chmod(0o444)
    with serving(models, under=WITHOUT_OVERRIDES) as server:
        with InferenceServerClient(server.url) as client:
            config = client.get_model_config("preprocess").config
        assert config.parameters["threads"].string_value != "auto"
        assert server.infer("embed", "image", [PHOTO])["embedding"].shape == (1, 64)


def of_small_images(repository: Path, folder: Path) -> Path:
    """A copy with which this machine's memory bounds no number of processes."""
    changed = copy(repository, folder)
    file = changed / "preprocess" / "config.pbtxt"
    assert '"110000000"' in file.read_text()
    file.write_text(file.read_text().replace('"110000000"', '"1000000"'))
    return changed


def test_more_cores_more_processes(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = of_small_images(tiny_repository, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with serving(models) as server:
        with InferenceServerClient(server.url) as client:
            config = client.get_model_config("preprocess").config
        assert [group.count for group in config.instance_group] == [3]
        assert config.parameters["threads"].string_value == "4"
        assert len(model_processes(server.process.pid, "preprocess")) == 3
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(server.infer, "classify", "image", [PHOTO]) for _ in range(24)]
            scores = [future.result()["scores"] for future in asked]
    assert all(found.shape == (1, 12) for found in scores)


def test_cores_are_those_of_the_quota() -> None:
    here = len(os.sched_getaffinity(0))
    period = ("cpu/cpu.cfs_period_us", "100000")
    assert cores() == here
    assert cores(("cpu.max", "max 100000")) == here
    assert cores(("cpu.max", "50000 100000")) == 1
    assert cores(("cpu/cpu.cfs_quota_us", "-1"), period) == here
    assert cores(("cpu/cpu.cfs_quota_us", "100000"), period) == 1


def test_folder_that_cannot_be_used(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for option, words in (("noexec", "is mounted noexec"), ("size=1m", "cannot be written: No sp")):
        mounted = with_mounts(f"mount -t tmpfs -o {option} tmpfs {tmp_path}")
        said = start_and_fail(tiny_repository, *FREE_PORTS, under=mounted)
        assert said.startswith(f"vit-server: {tmp_path} {words}")


def test_tmp_that_cannot_be_written(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    # With what is mounted below it, which a user namespace may not leave out.
    read_only = with_mounts("mount --rbind /tmp /tmp && mount -o remount,bind,ro /tmp")
    said = start_and_fail(tiny_repository, *FREE_PORTS, under=read_only)
    assert said.startswith("vit-server: /tmp cannot be written, and Triton's")


def test_repository_that_cannot_be_read(tiny_repository: Path, tmp_path: Path) -> None:
    repository = copy(tiny_repository, tmp_path)
    for part in (built(repository, "vit", "model.pt"), repository / "vit", repository):
        part.chmod(0)
        said = start_and_fail(repository, *FREE_PORTS, under=WITHOUT_OVERRIDES)
        assert "Permission denied" in said
        assert said.startswith(f"vit-server: {part}")


def test_first_answer_on_a_machine_that_is_too_busy(tiny_repository: Path, tmp_path: Path) -> None:
    """Triton takes a process that was silent for a second for dead."""
    flag = tmp_path / "was silent"
    repository = at_each_batch(
        tiny_repository,
        tmp_path,
        "import os, pathlib, signal",
        f"flag = pathlib.Path({str(flag)!r})",
        "if not flag.exists():",
        "    flag.touch()",
        "    os.kill(os.getpid(), signal.SIGSTOP)",
    )
    with serving(repository, errors=True) as server:
        assert flag.exists()
        assert server.infer("classify", "image", [PHOTO])["scores"].shape == (1, 12)
        server.process.terminate()
        said = server.process.communicate(timeout=60)[1].splitlines()
    assert [line for line in said if "starting again" in line] == [said[1]]
    assert "Stub process 'preprocess_0_" in said[1]


def test_start_on_a_machine_that_is_too_busy(tiny_repository: Path) -> None:
    """Triton's Python backend aborts where a process is not heard of for ten seconds."""
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        held: set[int] = set()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for pid in set(model_processes(process.pid, "preprocess")) - held:
                if len(list(Path(f"/proc/{pid}/task").iterdir())) > 1:  # it is alive
                    os.kill(pid, signal.SIGSTOP)
                    until = min(until, time.monotonic() + 12)
                    held.add(pid)
            time.sleep(0.02)
        for pid in held:
            os.kill(pid, signal.SIGCONT)
        assert any(line.startswith("Ready") for line in process.stdout or ())
        process.terminate()
        said = process.communicate(timeout=60)[1].splitlines()
    assert re.match("vit-server: tritonserver exited with code 134: .*without warm-up", said[1])
    assert said[3] == "vit-server: without warm-up every model answers; starting again"


def test_what_a_killed_server_left_is_told_by_its_lock(tiny_repository: Path) -> None:
    """Not by its pid: in a container the next one's may be another, or the same."""
    ours = os.getpid()  # that lives, and is no vit-server
    left, held = (f"vit_server_{ours}_{name}_" for name in ("left", "held"))
    shm = Path("/dev/shm")
    files = [shm / f"{prefix}{name}" for prefix in (left, held) for name in ("lock", "segment")]
    try:
        for file in files:
            file.touch()
        with files[2].open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with serving(tiny_repository):
                assert [file.exists() for file in files] == [False, False, True, True]
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_stops_with_nothing_left(tiny_repository: Path, number: signal.Signals) -> None:
    with serving(tiny_repository) as server:
        pids = descendants(server.process.pid)
        assert len(pids) >= 4  # tritonserver and a stub for each Python model
        assert segments(server.process.pid)
        server.process.send_signal(number)
        assert server.process.wait(60) == 0
        assert gone(pids)
        assert not segments(server.process.pid)


def test_ctrl_c_in_a_terminal_stops_it_once(tiny_repository: Path) -> None:
    """A terminal sends SIGINT to the whole foreground group, not only to vit-server."""
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    with started(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        for line in process.stdout or ():
            if line.startswith("Ready"):
                break
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in (process.stderr.read() if process.stderr else "")


def test_ctrl_c_while_it_is_imported(tiny_repository: Path) -> None:
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    with started(command, stderr=subprocess.PIPE) as process:
        while "aiohttp" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 0)  # 0 where all was imported by then
    assert "Traceback" not in errors


@pytest.mark.alone
def test_it_can_be_stopped_while_it_starts(tiny_repository: Path) -> None:
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    before = environments()
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while environments() == before:
            assert process.poll() is None
        pids = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert gone(pids)
    assert environments() <= before
    assert not segments(process.pid)


def test_it_can_be_stopped_before_tritonserver_starts(tiny_repository: Path) -> None:
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS]
    with started(command, stderr=subprocess.PIPE) as process:
        while not workspaces(process.pid):
            assert process.poll() is None
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert not workspaces(process.pid)
    assert not segments(process.pid)


def test_killed_vit_server_takes_everything_with_it(tiny_repository: Path) -> None:
    with serving(tiny_repository) as server:
        pids = descendants(server.process.pid)
        server.process.kill()
        server.process.wait()
        assert gone(pids, seconds=45)


def test_the_next_server_clears_up_after_a_killed_one(tiny_repository: Path) -> None:
    """All its processes at once, as where a container is killed."""
    with serving(tiny_repository) as server:
        for pid in (server.process.pid, *descendants(server.process.pid)):
            os.kill(pid, signal.SIGKILL)
        server.process.wait()
    assert workspaces(server.process.pid)
    assert segments(server.process.pid)
    with serving(tiny_repository):
        assert not workspaces(server.process.pid)
        assert not segments(server.process.pid)


def test_dead_model_process_ends_the_server(tiny_repository: Path) -> None:
    """Triton itself would stay ready, and fail every request for good."""
    with serving(tiny_repository, errors=True) as server:
        pids = descendants(server.process.pid)
        stub = model_process(server.process.pid, "preprocess")
        os.kill(stub, signal.SIGKILL)
        assert server.process.wait(10) == 1
        assert server.process.stderr is not None
        said = server.process.stderr.read().splitlines()[-1]
        assert said == f"vit-server: the process of the model 'preprocess' has exited (pid {stub})"
        assert gone(pids)
        assert not segments(server.process.pid)


def test_one_of_several_processes_dies_while_it_starts(
    tiny_repository: Path, tmp_path: Path
) -> None:
    """After the first answers, none of which it gave."""
    probes = tmp_path / "probes"
    models = at_each_batch(
        tiny_repository,
        tmp_path,
        "import os, pathlib, signal, time",
        f"probes = pathlib.Path({str(probes)!r})",
        "probes.open('a').write('.')",
        f"if probes.stat().st_size == {len(ENSEMBLES)}:",
        "    lists = pathlib.Path(f'/proc/{os.getppid()}/task').glob('*/children')",
        "    for pid in ' '.join(file.read_text() for file in lists).split():",
        "        process = pathlib.Path('/proc', pid)",
        "        ours = '/preprocess/' in (process / 'cmdline').read_text()",
        "        if ours and int(pid) != os.getpid():",
        "            os.kill(int(pid), signal.SIGKILL)",
        "            while ') Z ' not in (process / 'stat').read_text():",
        "                time.sleep(0.01)",
    )
    said = start_and_fail(models, *FREE_PORTS)
    assert said == "vit-server: the process of the model 'preprocess' has exited"


def test_any_folder_name_will_do(tiny_repository: Path, tmp_path: Path) -> None:
    """Triton hands the path to a shell, unquoted, and to Python as ASCII."""
    repository = tmp_path / "my models (é) $HOME;"
    shutil.copytree(tiny_repository, repository)
    with serving(repository) as server:
        assert server.infer("embed", "image", [PHOTO])["embedding"].shape == (1, 64)


def test_ipv6(tiny_repository: Path) -> None:
    with serving(tiny_repository, "--host", "::1") as server:
        assert server.url.startswith("[::1]:")
        assert server.http_url.startswith("http://[::1]:")
        addresses = sorted(address for _, address in listening(server.process.pid))
        assert addresses == ["127.0.0.1"] * 2 + ["::1"] * 3
        assert server.infer("embed", "image", [PHOTO])["embedding"].shape == (1, 64)


def test_killed_tritonserver_is_told_and_leaves_nothing(tiny_repository: Path) -> None:
    with serving(tiny_repository) as server:
        pids = descendants(server.process.pid)
        triton = tritonserver(server.process.pid)
        os.kill(triton, signal.SIGKILL)
        assert server.process.wait(60) == 128 + signal.SIGKILL
        assert gone(pids)
        assert not segments(server.process.pid)
