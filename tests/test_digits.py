"""A network that has really learned something keeps its accuracy through all of it.

A small ViT is trained here on scikit-learn's handwritten digits, saved in birder's format, built by
vit-builder and asked over gRPC.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vit_builder
from conftest import BIN, Array, png, serving
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from vit_builder.model import ViT, ViTConfig

CONFIG = ViTConfig(
    image_size=(32, 32), num_classes=10, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
)
MEAN, STD = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)


def digits() -> tuple[Array, Array, Array, Array]:
    """Images uint8 [N, 32, 32, 3] and classes [N], to train and to test on."""
    data = load_digits()
    gray = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in data.images]
    images = np.stack([np.asarray(image.convert("RGB").resize((32, 32))) for image in gray])
    train, test, train_classes, test_classes = train_test_split(
        images, data.target, test_size=360, random_state=0, stratify=data.target
    )
    return train, train_classes, test, test_classes


def normalised(images: Array) -> torch.Tensor:
    x = (torch.from_numpy(images) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return x.permute(0, 3, 1, 2)


def train(images: Array, classes: Array) -> ViT:
    torch.manual_seed(0)
    network = ViT(CONFIG)
    for parameter in (network.reg_tokens, network.pos_embedding):
        torch.nn.init.normal_(parameter, std=0.02)
    x, y = normalised(images), torch.from_numpy(classes)
    epochs, batch = 30, 64
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            loss = F.cross_entropy(network(x[rows])[0], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


# `changed`: by how many of 360 images the accuracy may differ.
@pytest.mark.parametrize(("precision", "changed"), [("fp32", 0), ("bf16", 1), ("int8", 1)])
def test_accuracy_survives_serving(precision: str, changed: int, tmp_path: Path) -> None:
    images, classes, test_images, test_classes = digits()
    network = train(images, classes)
    with torch.inference_mode():
        logits = network(normalised(test_images))[0]
    best_in_torch = logits.argmax(1).numpy()
    accuracy = (best_in_torch == test_classes).mean()
    assert accuracy > 0.95

    checkpoint = vit_builder.Checkpoint(
        "digits", CONFIG, network.state_dict(), [f"digit {i}" for i in range(10)], MEAN, STD, True
    )
    vit_builder.save(checkpoint, tmp_path / "digits.safetensors")
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
