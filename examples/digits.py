"""From training to serving: train a small ViT on handwritten digits, then serve it.

    python examples/digits.py    # half a minute; then open demo.png

Train, save as birder does, build, serve, classify: a template for a network of your own. The files
go into `digits/`; existing ones are reused, so delete the folder after a change.

What the server does to an image is what training has to do as well: RGB (transparency dropped, EXIF
orientation not applied), scaled to the network's size as a whole (no crop, aspect ratio not kept)
with Pillow's BICUBIC, divided by 255, less MEAN, divided by STD.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import vit_builder
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from vit_builder.model import ViT, ViTConfig
from vit_client import Client

BIN = Path(sys.executable).parent
FOLDER = Path("digits")
SHEET = Path("demo.png")
LABELS = [f"digit {i}" for i in range(10)]
CONFIG = ViTConfig(  # the image's sides are multiples of 16, a patch
    image_size=(32, 32),
    num_classes=len(LABELS),
    num_layers=2,
    num_heads=4,
    hidden_dim=64,
    mlp_dim=128,
)
MEAN, STD = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and classes [N]: 1437 to train on and 360 to test on."""
    data = load_digits()
    gray = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in data.images]
    images = np.stack([np.asarray(image.convert("RGB").resize((32, 32))) for image in gray])
    train, test, train_classes, test_classes = train_test_split(
        images, data.target, test_size=360, random_state=0, stratify=data.target
    )
    return train, train_classes, test, test_classes


def normalised(images: np.ndarray) -> torch.Tensor:
    """float32 [N, 3, 32, 32], normalised like the server does."""
    x = (torch.from_numpy(images) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return x.permute(0, 3, 1, 2)


def train(images: np.ndarray, classes: np.ndarray, epochs: int = 15) -> ViT:
    torch.manual_seed(0)
    network = ViT(CONFIG)
    for parameter in (network.reg_tokens, network.pos_embedding):  # else they start as zeros
        torch.nn.init.normal_(parameter, std=0.02)
    x, y = normalised(images), torch.from_numpy(classes)
    batch = 64
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


def save(network: ViT, path: Path) -> None:
    """Write a checkpoint as birder does: weights, labels and colour statistics in one file."""
    state = network.state_dict()
    checkpoint = vit_builder.Checkpoint("digits", CONFIG, state, LABELS, MEAN, STD, trained=True)
    vit_builder.save(checkpoint, path)


@contextlib.contextmanager
def serving(models: Path) -> Iterator[str]:
    """Start vit-server on free ports, yield its gRPC address, and stop it at the end."""
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    command = [BIN / "vit-server", "--model-repository", models, *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = ""
            for line in server.stdout or ():
                print(line, end="", flush=True)
                if line.startswith("gRPC"):
                    address = line.split()[1]
                if line.startswith("Ready"):
                    break
            else:
                sys.exit(server.wait())  # it has printed why
            yield address
        finally:
            server.terminate()
    if server.returncode:
        sys.exit(server.returncode)


def show(images: np.ndarray, address: str) -> None:
    """Draw the images with the server's predictions, using the command line."""
    files = [FOLDER / f"{number:02}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file)
    command = [BIN / "vit-client", "classify", *files, "--top-k", "1", "--sheet", SHEET]
    subprocess.run([*command, "--url", address], check=True, stdout=subprocess.DEVNULL)
    print(f"{SHEET} has {len(images)} of them, each with its answer.")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    checkpoint, models = FOLDER / "vit.safetensors", FOLDER / "models"
    images, classes, unseen, unseen_classes = digits()
    if not checkpoint.exists():
        print(f"Training a small ViT on {len(images)} images …", flush=True)
        save(train(images, classes), checkpoint)
    else:
        print(f"Using {checkpoint}: delete {FOLDER}/ to train again", flush=True)
    if not models.exists():
        command = [BIN / "vit-builder", "--checkpoint", checkpoint, "--output", models]
        subprocess.run(command, check=True)
    with serving(models) as address, Client(address) as client:
        answers = client.classify(list(unseen), top_k=1)
        right = sum(answers[i][0].index == unseen_classes[i] for i in range(len(unseen)))
        print(f"\nRight: {right} of {len(unseen)} images that it was not trained on")
        show(unseen[:40], address)


if __name__ == "__main__":
    main()
