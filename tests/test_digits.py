"""A network that has really learned something keeps its accuracy through all of it.

A small ViT is trained on scikit-learn's handwritten digits (examples/digits.py), saved in birder's
format, built by vit-builder and asked over gRPC.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BIN, png, serving
from vit_builder.model import ViT

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import digits


@pytest.fixture(scope="module")
def network() -> ViT:
    images, classes, _, _ = digits.digits()
    return digits.train(images, classes)


# `changed`: by how many of 360 images the accuracy may differ.
@pytest.mark.parametrize(("precision", "changed"), [("fp32", 0), ("bf16", 1), ("int8", 1)])
def test_accuracy_survives_serving(
    precision: str, changed: int, network: ViT, tmp_path: Path
) -> None:
    images, _, test_images, test_classes = digits.digits()
    with torch.inference_mode():
        logits = network(digits.normalised(test_images))[0]
    best_in_torch = logits.argmax(1).numpy()
    accuracy = (best_in_torch == test_classes).mean()
    assert accuracy > 0.95

    digits.save(network, tmp_path / "digits.safetensors")
    command = [BIN / "vit-builder", "--checkpoint", tmp_path / "digits.safetensors"]
    command += ["--precision", precision, "--output", tmp_path / "models"]
    if precision == "int8":
        command += ["--calibrate", tmp_path / "train"]
        (tmp_path / "train").mkdir()
        for number, image in enumerate(images[:100]):
            (tmp_path / "train" / f"{number:03}.png").write_bytes(png(image))
    subprocess.run(command, check=True)

    labels: list[bytes] = []
    with serving(tmp_path / "models") as server:
        for batch in np.array_split(test_images, 30):  # 12 images each
            answer = server.infer("classify", "image", [png(image) for image in batch])
            labels += answer["labels"][:, 0].tolist()
    best_served = np.array([int(label.decode().removeprefix("digit ")) for label in labels])
    if precision == "fp32":
        np.testing.assert_array_equal(best_served, best_in_torch)
    assert (best_served == test_classes).mean() == pytest.approx(accuracy, abs=changed / 360)
