"""vit-builder as a command: what it writes, and what it never leaves behind."""

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import vit_builder
from conftest import BIN, GOLDENS, builder, built, serving
from google.protobuf import text_format
from processes import started
from tritonclient.grpc.model_config_pb2 import ModelConfig
from vit_builder import verify
from vit_builder.model import ViTConfig
from vit_client import Client

TINY = ("--checkpoint", str(GOLDENS / "tiny.pt"))


def configs(repository: Path) -> dict[str, ModelConfig]:
    paths = repository.glob("*/config.pbtxt")
    return {p.parent.name: text_format.Parse(p.read_text(), ModelConfig()) for p in paths}


def test_repository_is_complete_and_says_what_it_is(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "models"
    result = builder(*TINY, "--output", output, "--precision", "fp32", "--max-batch-size", 5)
    assert result.returncode == 0, result.stderr
    assert "embedding_min_cosine" in result.stdout
    assert f"Wrote {output}" in result.stderr
    assert {path.name for path in output.iterdir()} == {
        *("preprocess", "vit", "postprocess", "build_report.json"),
        *("classify", "probabilities", "embed", "features", "analyze", "everything"),
    }
    found = configs(output)
    assert {config.max_batch_size for config in found.values()} == {5}
    assert [list(tensor.dims) for tensor in found["vit"].output] == [
        *([12], [64], [64, 4, 4], [12], [12]),
    ]
    assert [warmup.batch_size for warmup in found["vit"].model_warmup] == [1, 5]
    assert {key: value.string_value for key, value in found["vit"].parameters.items()} == {
        "builder_version": vit_builder.__version__,
        "INFERENCE_MODE": "true",
        "DISABLE_OPTIMIZED_EXECUTION": "true",
        "model_name": "tiny",
        "weights": "trained",
        "weights_sha256": hashlib.sha256((GOLDENS / "tiny.pt").read_bytes()).hexdigest(),
        "precision": "fp32",
        "max_request_bytes": "67108864",
        "model_version": built(output, "vit").name,
    }
    assert f"model version {built(output, 'vit').name}" in result.stderr
    report = json.loads((output / "build_report.json").read_text())
    assert report["weights_sha256"] == found["vit"].parameters["weights_sha256"].string_value
    assert report["agreement"]["embedding_min_cosine"] > 0.999999
    labels = built(output, "postprocess", "labels.txt").read_text().splitlines()
    assert labels == vit_builder.load(GOLDENS / "tiny.pt").labels
    assert list(output.parent.iterdir()) == [output]  # nothing half-built beside it


def test_template_has_the_sizes_of_the_published_checkpoint() -> None:
    """So that `model_repository/` reads as what is served, and the builder changes no more."""
    template = Path(__file__).parent.parent / "model_repository"
    found = configs(template)
    config = ViTConfig()
    assert list(found["vit"].input[0].dims) == [*config.image_size, 3]
    assert list(found["vit"].output[0].dims) == [config.num_classes]
    neck = {output.name: list(output.dims) for output in found["everything"].output}["neck"]
    assert neck == [config.hidden_dim, *config.grid]


VIT = {
    "probabilities__0": "probabilities",
    "embedding__1": "embedding",
    "neck__2": "neck",
    "top_scores__3": "vit_top_scores",
    "top_indices__4": "vit_top_indices",
}
BEST = {"top_scores__3", "top_indices__4"}


@pytest.mark.parametrize(
    ("ensemble", "outputs", "of_vit"),
    [
        ("classify", ["scores", "indices", "labels"], BEST),
        ("probabilities", ["probabilities"], {"probabilities__0"}),
        ("embed", ["embedding"], {"embedding__1"}),
        ("features", ["neck"], {"neck__2"}),
        (
            "analyze",
            ["scores", "indices", "labels", "probabilities", "embedding"],
            VIT.keys() - {"neck__2"},
        ),
        (
            "everything",
            ["scores", "indices", "labels", "probabilities", "embedding", "neck"],
            VIT.keys(),
        ),
    ],
)
def test_an_ensemble_runs_and_copies_what_its_answer_needs(
    tiny_repository: Path, ensemble: str, outputs: list[str], of_vit: set[str]
) -> None:
    config = configs(tiny_repository)[ensemble]
    assert (config.name, config.platform) == (ensemble, "ensemble")
    assert [(tensor.name, list(tensor.dims)) for tensor in config.input] == [("image", [1])]
    assert [tensor.name for tensor in config.output] == outputs
    version = int(built(tiny_repository, ensemble).name)  # never another model's, beside it
    best = {"top_scores": "vit_top_scores", "top_indices": "vit_top_indices"}
    steps = [
        ("preprocess", version, {"image": "image"}, {"pixels": "preprocessed_pixels"}),
        ("vit", version, {"pixels": "preprocessed_pixels"}, {name: VIT[name] for name in of_vit}),
        ("postprocess", version, best, {name: name for name in ("scores", "indices", "labels")}),
    ]
    assert [
        (
            step.model_name,
            step.model_version,
            dict(step.input_map),
            dict(step.output_map),
        )
        for step in config.ensemble_scheduling.step
    ] == steps[: 3 if "labels" in outputs else 2]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_compared_with_fp32(precision: str, tmp_path: Path) -> None:
    result = builder(*TINY, "--output", tmp_path / "m", "--precision", precision)
    assert result.returncode == 0, result.stderr
    assert f"{precision} against fp32 eager" in result.stdout
    report = json.loads((tmp_path / "m" / "build_report.json").read_text())
    assert 1e-7 < report["agreement"]["embedding_max_diff"] < 0.05


def test_neck_can_be_sent_in_fp16(tmp_path: Path) -> None:
    """Half the bytes, the same numbers to 11 bits; everything else stays as it is."""
    result = builder(*TINY, "--output", tmp_path / "m", "--neck-precision", "fp16")
    assert result.returncode == 0, result.stderr
    photo = (GOLDENS / "images" / "tall.jpg").read_bytes()
    with serving(tmp_path / "m") as server, Client(server.url) as client:
        sent = server.infer("features", "image", [photo])["neck"]
        assert sent.dtype == np.float16
        neck = client.features(photo)["neck"]
        assert neck.dtype == np.float32
        np.testing.assert_array_equal(neck, sent[0].astype(np.float32))
        np.testing.assert_allclose(neck.mean((1, 2)), client.embed(photo), atol=1e-3, rtol=0)


def test_fast_jpeg_is_a_choice(tmp_path: Path) -> None:
    photo = (Path(__file__).parent.parent / "photos" / "coffee.jpg").read_bytes()
    pixels = {}
    for options in ((), ("--fast-jpeg",)):
        result = builder(*TINY, "--output", tmp_path / "m", *options)
        assert result.returncode == 0, result.stderr
        with serving(tmp_path / "m") as server:
            pixels[options] = server.infer("preprocess", "image", [photo])["pixels"].astype(int)
    exact, fast = pixels.values()
    assert 0 < abs(fast - exact).mean() < 1


def test_sibling_size_is_served_as_it_is(tmp_path: Path) -> None:
    """384 px and 10,000 classes, as the inat21 checkpoints have; shallow, to be quick."""
    config = ViTConfig((384, 384), 10_000, num_layers=1)
    settings = vit_builder.Settings("fp32", 2, 100)
    vit_builder.build(vit_builder.random(config), settings, tmp_path / "m")
    with serving(tmp_path / "m") as server:
        photo = (GOLDENS / "images" / "tall.jpg").read_bytes()
        assert server.infer("features", "image", [photo])["neck"].shape == (1, 512, 24, 24)
        assert server.infer("probabilities", "image", [photo])["probabilities"].shape == (1, 10_000)
        assert server.infer("classify", "image", [photo])["labels"].shape == (1, 100)


def test_batch_of_one_is_a_batch_size(tmp_path: Path) -> None:
    result = builder(*TINY, "--output", tmp_path / "m", "--max-batch-size", 1, "--top-k", 1)
    assert result.returncode == 0, result.stderr
    with serving(tmp_path / "m") as server:
        photo = (GOLDENS / "images" / "tall.jpg").read_bytes()
        assert server.infer("classify", "image", [photo])["labels"].shape == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--checkpoint", "nothing.pt"), "nothing.pt: no such file"),
        ((*TINY, "--top-k", "13"), "--top-k 13 is more than the 12 classes"),
        ((*TINY, "--weights", "random"), "not allowed with"),
        ((*TINY, "--max-batch-size", "0"), "0 is not a positive whole number"),
    ],
)
def test_mistakes_get_a_sentence(arguments: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    result = builder(*arguments, "--output", tmp_path / "m")
    assert result.returncode not in (0, -9)
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = builder(*TINY, "--output", tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path} exists, but vit-builder did not write it" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = builder(*TINY, "--output", tmp_path / "file" / "m")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "cannot be written: " in result.stderr


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path) -> None:
    result = builder("--weights", "random", "--output", "/dev/shm")
    assert result.returncode == 1
    assert result.stderr.startswith("vit-builder: /dev/shm is a mount point")


def test_what_a_killed_build_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".m.building-999999999" / "vit").mkdir(parents=True)
    (tmp_path / f".m.building-{os.getpid()}").mkdir()  # of one that still runs
    assert builder(*TINY, "--output", tmp_path / "m").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"m", f".m.building-{os.getpid()}"}


def test_repository_is_exchanged_whole(tmp_path: Path) -> None:
    output = tmp_path / "m"
    assert builder(*TINY, "--output", output, "--precision", "fp32").returncode == 0
    with built(output, "vit", "model.pt").open("rb") as held:  # as a running server would
        assert builder(*TINY, "--output", output, "--precision", "bf16").returncode == 0
        assert len(held.read()) > 600_000  # still the fp32 file
    assert json.loads((output / "build_report.json").read_text())["precision"] == "bf16"
    assert list(tmp_path.iterdir()) == [output]


def test_failed_verification_leaves_the_old_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = vit_builder.load(GOLDENS / "tiny.pt")
    output = tmp_path / "m"
    vit_builder.build(checkpoint, vit_builder.Settings("fp32", 2, 12), output)
    before = (output / "build_report.json").read_bytes()
    # Held to fp32's limits, bf16 fails.
    monkeypatch.setitem(verify.LIMITS, "bf16", verify.LIMITS["fp32"])
    with pytest.raises(vit_builder.VerificationError, match="probabilities_max_diff is"):
        vit_builder.build(checkpoint, vit_builder.Settings("bf16", 2, 12), output)
    assert (output / "build_report.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [BIN / "vit-builder", "--weights", "random", "--output", tmp_path / "m"]
    with started(command, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        while list(tmp_path.iterdir()) and time.monotonic() < deadline:
            process.send_signal(number)  # again, as a person would: C code can swallow one
            time.sleep(1)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_no_device_is_baked_in(tiny_repository: Path) -> None:
    """The traced file can be loaded on any device: here on `meta`, which has no memory."""
    module = torch.jit.load(built(tiny_repository, "vit", "model.pt"), map_location="meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert not re.search(r'Device = prim::Constant\[value="cuda', str(module.inlined_graph))
    # It also runs there: what is made for a CPU is left out.
    outputs = module(torch.empty(3, 64, 64, 3, dtype=torch.uint8, device="meta"))
    assert [list(output.shape) for output in outputs[:2]] == [[3, 12], [3, 64]]
