"""`make bench-gpu`, as far as a machine without a GPU can try it: in small, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vit_builder
from conftest import GOLDENS
from google.protobuf import text_format
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tritonclient.grpc.model_config_pb2 import ModelConfig
from vit_builder.export import ServedViT

from bench.gpu import __main__ as program
from bench.gpu import kit, report
from bench.gpu.bare import VALUES, WAYS, flops
from bench.gpu.served import PIXELS, write
from bench.load import perf_analyzer

ROOT = Path(__file__).parents[1]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def small(output: Path, *parts: str) -> report.Results:
    tiny = ["--device", "cpu", "--checkpoint", GOLDENS / "tiny.pt", "--output", output]
    done = bench(*tiny, "--rounds", 1, "--seconds", 0.2, "--parts", *parts)
    assert done.returncode == 0, done.stderr
    assert (output / "report.md").read_text() in done.stdout
    results: report.Results = json.loads((output / "results.json").read_text())
    assert list(results["seconds"]) == list(parts)
    return results


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_sentence() -> None:
    done = bench()
    assert done.returncode == 1
    assert done.stderr.startswith("bench-gpu: ")
    assert "GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_all_but_the_server(tmp_path: Path) -> None:
    results = small(tmp_path, "bare", "agreement", "standin", "cores", "decoders")
    bare, agreement = results["bare"], results["agreement"]
    for value in VALUES:
        assert set(bare[value]["images"]) == set(WAYS)
        for batches in bare[value]["images"].values():
            assert all(rate > 0 for rates in batches.values() for rate in rates)
        assert list(bare[value]["first_ms"]) == ["1", "2", "3", "4"]
    assert bare["copy"] > 0
    assert all(rate > 0 for rate in bare["matrix"].values())
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    assert (
        agreement["measured"]["embedding_min_cosine"] > agreement["limits"]["embedding_min_cosine"]
    )
    assert [(e["instances"], e["batch"]) for e in results["standin"]["rates"]] == [(1, 4), (2, 4)]
    assert all(each["images"] > 0 for each in results["standin"]["rates"])
    assert all(each["photos"] > 0 for each in results["cores"]["rates"])
    assert results["decoders"]["differences"]["Pillow, resized by torch"]["mean level"] < 1
    text = (tmp_path / "report.md").read_text()
    assert "| served with pixels, of bare | 0.7 | not measured | open |" in text


def test_a_step_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(_: program.Bench) -> report.Results:
        raise RuntimeError("CUDA error: out of memory\nand more lines")

    monkeypatch.setitem(program.STEPS, "bare", fails)
    tiny = ["--device", "cpu", "--checkpoint", GOLDENS / "tiny.pt", "--output", tmp_path]
    arguments = map(str, [*tiny, "--parts", "bare", "agreement"])
    monkeypatch.setattr(sys, "argv", ["bench-gpu", *arguments])
    assert program.main() == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == {"bare": "RuntimeError: CUDA error: out of memory"}
    assert results["agreement"]["measured"]
    assert "- bare failed: RuntimeError: CUDA error: out of memory" in capfd.readouterr().out


@pytest.mark.timeout(600)  # two servers, one after the other
def test_served(tmp_path: Path) -> None:
    try:
        perf_analyzer.install()
    except perf_analyzer.PerfAnalyzerError as e:
        pytest.skip(str(e))
    rows = small(tmp_path, "served")["served"]["rows"]
    assert [row["instances"] for row in rows] == [1, 1, 2, 2]
    assert all(row["per_second"] > 0 for row in rows), rows
    pixels, jpegs = rows[:2]
    assert (pixels["model"], pixels["preprocess"]) == (PIXELS, 0)
    assert jpegs["preprocess"] > 0


@pytest.mark.parametrize(("kind", "number"), [("cuda", 1), ("cpu", 2)])
def test_instances_reach_triton(
    tiny_repository: Path, tmp_path: Path, kind: str, number: int
) -> None:
    write(tiny_repository, tmp_path / "models", 3, kind)
    configs = {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in tmp_path.glob("models/*/config.pbtxt")
    }
    (group,) = configs["vit"].instance_group
    assert (group.count, group.kind) == (3, number)
    assert [tensor.name for tensor in configs[PIXELS].input] == ["pixels"]


@pytest.fixture(scope="module")
def served() -> ServedViT:
    checkpoint = vit_builder.load(GOLDENS / "tiny.pt")
    return ServedViT(checkpoint.network(), checkpoint, "fp32", 12).eval()


def test_the_kit_has_what_the_machine_lacks() -> None:
    names = {requirement.partition("==")[0] for requirement in kit.requirements()}
    assert {"tritonclient", "grpcio", "protobuf", "aiohttp", "simplejpeg", "safetensors"} <= names
    assert not names & {*kit.LEFT_OUT, "numpy", "nvidia-pytriton"}


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="it would run")
def test_the_kit_is_for_one_python(tmp_path: Path) -> None:
    script = Path(kit.__file__).with_name("kit_run.py")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("run.py: this kit is for Python 3.12, not 3.1")
    assert len(done.stderr.splitlines()) == 1


def test_operations_are_those_that_torch_counts(served: ServedViT) -> None:
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # of others it knows not all
        served(images)
    assert counter.get_total_flops() == 2 * flops(served.network.cfg)


def test_goals_are_judged_where_they_hold() -> None:
    images = {"eager": {"64": [20000.0]}, "TorchScript": {"64": [12500.0, 12400.0, 13000.0]}}
    rows = [
        {"model": PIXELS, "per_second": 6250.0},
        {"model": PIXELS, "failed": "why"},
        {"model": "embed", "per_second": 4500.0},
    ]
    results: report.Results = {
        "facts": {"device": "NVIDIA H100 80GB HBM3, 79 GiB"},
        "bare": {"as served": {"images": images}},
        "standin": {"rates": [{"images": 11000.0}, {"images": 11875.0}]},
        "cores": {"rates": [{"photos": 300.0}, {"photos": 5000.0}]},
        "served": {"rows": rows},
    }
    assert [row[2:] for row in report.goals(results)] == [
        ["12500", "yes"],
        ["0.95", "yes"],
        ["0.5", "no"],
        ["0.9", "yes"],
    ]
    results["facts"] = {"device": "another"}
    assert report.goals(results)[0][3] == "neither an H100 nor an H200"
    del results["bare"]
    assert [row[3] for row in report.goals(results)] == ["open", "open", "open", "yes"]
