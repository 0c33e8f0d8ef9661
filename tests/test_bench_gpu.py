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

from bench.gpu import report
from bench.gpu.bare import flops, write_out
from bench.gpu.served import PIXELS, Settings, score, write
from tests.load import perf_analyzer

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
    return results


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_sentence() -> None:
    done = bench()
    assert done.returncode == 1
    assert done.stderr.startswith("bench-gpu: ")
    assert "GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bare_and_decoders(tmp_path: Path) -> None:
    results = small(tmp_path, "bare", "decoders")
    bare, decoders = results["bare"], results["decoders"]
    assert bare["missing"] == ["torch.compile (--compile)"]
    (found,) = bare["rounds"]
    assert found["copy"] > 0
    assert all(rate > 0 for rate in found["matrix"].values())
    assert all(rate > 0 for rates in found["images"].values() for rate in rates.values())
    assert found["images"].keys() == bare["cosines"].keys()
    assert min(bare["cosines"].values()) > 0.9999
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    assert decoders["differences"]["Pillow, resized by torch"]["mean level"] < 1
    text = (tmp_path / "report.md").read_text()
    assert "| served with pixels, of bare | 0.7 | not measured | open |" in text


@pytest.mark.timeout(600)  # three servers, one after the other
def test_served(tmp_path: Path) -> None:
    try:
        perf_analyzer.install()
    except perf_analyzer.PerfAnalyzerError as e:
        pytest.skip(str(e))
    served = small(tmp_path, "served")["served"]
    assert [trial["settings"]["instances"] for trial in served["trials"]] == [1, 2]
    assert all(score(trial["rounds"]) > 0 for trial in served["trials"])
    (found,) = served["final"]
    assert found["bare"] > 0
    for points in found["models"].values():
        assert all(point["per_second"] > 0 for point in points), points
    assert found["models"][PIXELS][0]["preprocess"] == 0
    assert found["models"]["embed"][0]["preprocess"] > 0


def test_every_setting_reaches_triton(tiny_repository: Path, tmp_path: Path) -> None:
    settings = Settings(2, max_batch_size=128, queue_delay=700, profiling_executor=True)
    write(tiny_repository, tmp_path / "models", settings, "cuda")
    configs = {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in tmp_path.glob("models/*/config.pbtxt")
    }
    assert {config.max_batch_size for config in configs.values()} == {128}
    vit = configs["vit"]
    (group,) = vit.instance_group
    assert (group.count, group.kind) == (2, group.KIND_GPU)
    waiting = configs["preprocess"].parameters["max_waiting_images"].string_value
    assert waiting == "128"
    assert vit.dynamic_batching.max_queue_delay_microseconds == 700
    assert vit.parameters["DISABLE_OPTIMIZED_EXECUTION"].string_value == "false"
    assert max(warmup.batch_size for warmup in vit.model_warmup) == 128
    assert [tensor.name for tensor in configs[PIXELS].input] == ["pixels"]


def test_the_best_load_counts_by_its_median() -> None:
    def rounds(*rates: list[float]) -> list[list[dict[str, float]]]:
        return [[{"per_second": rate} for rate in each] for each in rates]

    assert score(rounds([1, 9], [2, 8], [99, 7])) == 8
    assert score([[{"failed": "why"}]]) == 0  # type: ignore[dict-item]
    assert score([]) == 0


@pytest.fixture(scope="module")
def served() -> ServedViT:
    checkpoint = vit_builder.load(GOLDENS / "tiny.pt")
    return ServedViT(checkpoint.network(), checkpoint, "fp32", 12).eval()


def test_operations_are_those_that_torch_counts(served: ServedViT) -> None:
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # of others it knows not all
        served(images)
    assert counter.get_total_flops() == 2 * flops(served.network.cfg)


def test_written_out_is_the_same_norm() -> None:
    checkpoint = vit_builder.load(GOLDENS / "tiny.pt")
    fused, written = (ServedViT(checkpoint.network(), checkpoint, "fp32", 12) for _ in range(2))
    assert "RMSNorm" not in str(write_out(written))
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(written(images)[1], fused(images)[1], atol=1e-5, rtol=1e-5)


def test_goals_are_judged_where_they_hold() -> None:
    images = {"eager": {"64": 20000.0}, "TorchScript": {"64": 12500.0}}
    final = [{"bare": 12000.0, "models": {PIXELS: [{"per_second": 6000.0}, {"failed": "why"}]}}]
    results = {
        "facts": {"device": "NVIDIA H200, 140 GiB"},
        "bare": {"rounds": [{"images": images}]},
        "served": {"final": final},
    }
    assert [row[2:] for row in report.goals(results)] == [["12500", "yes"], ["0.5", "no"]]
    results["facts"] = {"device": "another"}
    assert report.goals(results)[0][3] == "not an H200"
