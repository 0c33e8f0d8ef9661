"""int8 on CPUs: its accuracy, which layers it leaves alone, and where it does not run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vit_builder
from conftest import GOLDENS, PHOTOS, builder, built, golden_image, png, reloaded, serving
from safetensors.numpy import load_file
from vit_builder.export import ServedViT, quantise, trace
from vit_builder.images import SHIPPED, pixels
from vit_builder.int8 import MAX_ERROR, rounded

TINY = vit_builder.load(GOLDENS / "tiny.pt")
TINY_PHOTOS = pixels(SHIPPED, TINY.config.image_size)


def cosines(ours: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(ours.double(), wanted.double())


def test_full_size_network_served_in_int8(tmp_path: Path) -> None:
    """With made weights, where near ties are everywhere; the first photo is the one held apart."""
    done = builder("--weights", "random", "--precision", "int8", "--output", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert "the photos that vit-builder ships: 2 images, and 1 held out" in done.stderr
    report = json.loads((tmp_path / "m" / "build_report.json").read_text())
    assert report["agreement"]["embedding_min_cosine"] > 0.9995  # 0.99976
    facts = report["int8"]
    assert facts["layers_in_fp32"] == []
    assert len(facts["layer_errors"]) == 12 * 4 + 1
    assert max(facts["layer_errors"].values()) < 0.02
    golden = load_file(GOLDENS / "full-expected-legacy.safetensors")
    names = sorted({key.partition("/")[0] for key in golden})
    with serving(tmp_path / "m") as server:
        answer = server.infer(
            "everything", "image", [golden_image(name).read_bytes() for name in names]
        )
    wanted = {
        output: np.stack([golden[f"{name}/{output}"] for name in names])
        for output in ("embedding", "neck", "probabilities")
    }
    cosine = cosines(*(torch.tensor(each["embedding"]) for each in (answer, wanted)))
    assert cosine.min() > 0.9995
    np.testing.assert_allclose(answer["neck"], wanted["neck"], atol=0.25, rtol=0)  # 0.17
    np.testing.assert_allclose(answer["probabilities"], wanted["probabilities"], atol=0.02, rtol=0)


def test_an_answer_does_not_depend_on_its_batch() -> None:
    """Scales are static. Only the attention's fp32 sums may round the other way."""
    layers = quantise(TINY, TINY_PHOTOS)
    module = reloaded(trace(TINY, "int8", 12, "cpu", int8=layers))
    assert str(module.inlined_graph).count("onednn::qlinear_pointwise") >= len(layers) == 13
    noise = torch.randint(0, 256, (15, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        alone = module(TINY_PHOTOS[:1])
        together = module(torch.cat([TINY_PHOTOS[:1], noise]))
    for i in range(4):
        torch.testing.assert_close(together[i][:1], alone[i], atol=0.02, rtol=0)


@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2"])  # without VNNI; of those that there are
def test_without_vnni_the_same_weights_run_in_fp32(isa: str, tmp_path: Path) -> None:
    torch.jit.save(trace(TINY, "int8", 12, "cpu", int8=quantise(TINY, TINY_PHOTOS)), tmp_path / "m")
    torch.save(TINY_PHOTOS, tmp_path / "photos")
    code = (
        "import sys, torch\n"
        "from vit_builder import int8\n"
        "module = torch.jit.load(sys.argv[1] + '/m')\n"
        "with torch.inference_mode():\n"
        "    torch.save(module(torch.load(sys.argv[1] + '/photos')), sys.argv[1] + '/out')\n"
        "print(int8.is_exact())\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    reference = ServedViT(TINY.network(), TINY, "fp32", 12).eval()
    with torch.inference_mode():
        wanted = reference(TINY_PHOTOS)[1]
    assert cosines(torch.load(tmp_path / "out")[1], wanted).min() > 0.9995


def test_no_device_is_baked_in() -> None:
    module = reloaded(trace(TINY, "int8", 12, "cpu", int8=quantise(TINY, TINY_PHOTOS)), "meta")
    outputs = module(torch.empty(3, 64, 64, 3, dtype=torch.uint8, device="meta"))
    assert [list(output.shape) for output in outputs[:2]] == [[3, 12], [3, 64]]


def with_an_outlier() -> vit_builder.Checkpoint:
    """One of the hidden channels is 300 times as strong as the rest, and hardly looked at."""
    state = {name: tensor.clone() for name, tensor in TINY.state.items()}
    state["encoder.block.1.mlp.0.weight"][7] *= 300
    state["encoder.block.1.mlp.3.weight"][:, 7] /= 300
    return vit_builder.Checkpoint(
        *("outlier", TINY.config, state, TINY.labels, TINY.rgb_mean, TINY.rgb_std, True)
    )


def test_a_layer_that_int8_does_not_suit_stays_in_fp32(tmp_path: Path) -> None:
    vit_builder.save(with_an_outlier(), tmp_path / "outlier.safetensors")
    file = ("--checkpoint", tmp_path / "outlier.safetensors")
    done = builder(*file, "--precision", "int8", "--output", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert "encoder.block.1.mlp.3 stays in fp32: its error in int8 would be" in done.stderr
    report = json.loads((tmp_path / "m" / "build_report.json").read_text())
    assert report["int8"]["layers_in_fp32"] == ["encoder.block.1.mlp.3"]
    assert report["int8"]["layer_errors"]["encoder.block.1.mlp.3"] > MAX_ERROR
    assert report["agreement"]["embedding_min_cosine"] > 0.9995


def test_weights_are_rounded_to_the_nearest_by_channel() -> None:
    weight = torch.tensor([[1.27, -0.014, 0.005001], [0.0, 0.0, 0.0], [-254.0, 127.0, 2.9]])
    steps, scales = rounded(weight)
    assert steps.tolist() == [[127, -1, 1], [0, 0, 0], [-127, 64, 1]]
    torch.testing.assert_close(scales[[0, 2]], torch.tensor([0.01, 2.0]))


def folder_of(tmp_path: Path, count: int) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(count):
        image = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        (folder / f"{i:03}.png").write_bytes(png(image))
    os.mkfifo(folder / "pipe.png")
    for name in ("notes.txt", "paper.pdf", "drawing.eps", ".hidden.png"):
        (folder / name).write_text("not asked for")
    return folder


def test_own_images_to_calibrate_with_are_another_model(tmp_path: Path) -> None:
    """One in four is held apart, and no more are taken than needed; all that is in the report."""
    tiny = ("--checkpoint", GOLDENS / "tiny.pt", "--precision", "int8", "--output")
    folder = folder_of(tmp_path, 70)
    versions = []
    for calibrate in ((), ("--calibrate", folder), ("--calibrate", folder)):
        done = builder(*tiny, tmp_path / "m", *calibrate)
        assert done.returncode == 0, done.stderr
        versions.append(built(tmp_path / "m", "vit").name)
    assert versions[0] != versions[1] == versions[2]
    facts = json.loads((tmp_path / "m" / "build_report.json").read_text())["int8"]
    assert (facts["calibrated_with"], facts["images"], facts["held_apart"]) == (
        f"{folder} (which has 70)",
        *(31, 11),
    )


@pytest.mark.parametrize(
    ("files", "arguments", "sentence"),
    [
        ({}, ["--calibrate", "FOLDER"], "no images"),
        ({"a.jpg": PHOTOS / "coffee.jpg"}, ["--calibrate", "FOLDER"], "one image"),
        ({}, ["--calibrate", "FOLDER/nowhere"], "nowhere: no such folder"),
        ({}, ["--calibrate", __file__], "test_int8.py: not a folder"),
        (
            {"a.jpg": PHOTOS / "coffee.jpg", "b.jpg": __file__},
            ["--calibrate", "FOLDER"],
            "b.jpg is",
        ),
        ({}, ["--device", "cuda"], "int8 is for CPUs"),
        ({}, ["--precision", "fp32", "--calibrate", "FOLDER"], "for --precision int8 only"),
    ],
)
def test_mistakes_get_a_sentence(
    files: dict[str, Path], arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, source in files.items():
        (folder / name).write_bytes(Path(source).read_bytes())
    given = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    tiny = ("--checkpoint", GOLDENS / "tiny.pt", "--output", tmp_path / "m", "--precision", "int8")
    done = builder(*tiny, *given)
    assert done.returncode not in (0, -9)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m").exists()
