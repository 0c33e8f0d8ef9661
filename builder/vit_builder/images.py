"""The images for verifying a build and for calibrating int8."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SHIPPED = sorted((Path(__file__).parent / "photos").glob("*.jpg"))
# More would change the scales by less than the headroom they get (int8.py).
MAX_CALIBRATION = 32
HELD_APART = 4  # one in this many is held out
# Those that `preprocess` accepts.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


class CalibrationError(Exception):
    """The folder of images to calibrate with cannot be used; the message says why."""


@dataclass(frozen=True)
class Calibration:
    """Images for int8: for calibration, and held out for verification."""

    source: str
    images: Tensor  # uint8 [N, H, W, 3]
    held_apart: Tensor  # uint8 [M, H, W, 3]

    def digest(self) -> str:
        """Return the SHA-256 of the calibration pixels, which affect the model's outputs."""
        return hashlib.sha256(self.images.numpy().data).hexdigest()


def calibration(folder: Path | None, size: tuple[int, int]) -> Calibration:
    """Return images from `folder`, spread evenly by name; by default the shipped photos.

    Args:
        size: (H, W) of the network's input.

    Raises:
        CalibrationError: there are fewer than two images, or one of them cannot be read.
    """
    files = SHIPPED if folder is None else images(folder)
    count = len(files)
    most = MAX_CALIBRATION * HELD_APART // (HELD_APART - 1)
    files = [files[i] for i in np.linspace(0, len(files) - 1, min(len(files), most)).astype(int)]
    rows = pixels(files, size)
    apart = torch.arange(len(files)) % HELD_APART == 0
    source = "the photos that vit-builder ships"
    if folder is not None:
        source = f"{folder.resolve()} (which has {count})"
    return Calibration(source, rows[~apart], rows[apart])


def images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, by name; other files are skipped.

    Raises:
        CalibrationError: there are fewer than two.
    """
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise CalibrationError(f"--calibrate {folder}: {what}")
    readable = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    files = sorted(
        file for file in folder.rglob("[!.]*") if file.suffix.lower() in readable and file.is_file()
    )
    if len(files) < 2:
        found = "one image" if files else "no images"
        raise CalibrationError(
            f"--calibrate {folder}: {found}. At least two are needed: one in {HELD_APART} is "
            "held out to measure the error"
        )
    return files


def pixels(files: list[Path], size: tuple[int, int]) -> Tensor:
    """Return uint8 [N, H, W, 3], as `preprocess` produces them.

    Raises:
        CalibrationError: a file is not a readable image.
    """
    height, width = size
    rows = []
    for file in files:
        try:
            with Image.open(file, formats=FORMATS) as image:
                rgb = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        except UnidentifiedImageError:
            raise CalibrationError(f"{file} is not an image") from None
        # Pillow's decoders raise more exceptions than are documented.
        except Exception as e:
            raise CalibrationError(f"{file} cannot be read: {e}") from None
        rows.append(torch.from_numpy(np.array(rgb)))
    return torch.stack(rows)
