"""`features -o` and `--picture`: one image's feature map as a tensor file or as a picture."""

from __future__ import annotations

import io
import os
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ConfigurationError, shortened
from ._common import IMAGES_FAILED, OK, connect, escaped
from ._embed import describe
from ._files import check_place, replacing
from ._inputs import STDIN, Source, expand
from ._pictures import check_picture, decoded, write_picture
from ._report import error
from ._tables import add_array, write_safetensors

Array = npt.NDArray[np.float32]

# Size of each half of a picture; without a limit, an image of one row would be millions wide.
_HEIGHT, _MOST_WIDTH = 512, 2048


def features_to_file(options: Namespace) -> int:
    """Save the feature map of one image; returns the exit code."""
    if options.json:
        raise ConfigurationError("--json prints the map, -o and --picture write files: not both")
    names, told = expand(options)
    if len(names) != 1:
        raise ConfigurationError(f"-o and --picture take one image, not {len(names)}")
    output = Path(options.output) if options.output else None
    if output is not None and output.suffix not in (".safetensors", ".npz"):
        raise ConfigurationError(f"{shortened(output)}: the name must end in .safetensors, .npz")
    if output is not None:
        check_place(output)
    if options.picture:
        check_picture(Path(options.picture), names)
    with connect(options) as client:
        # A pipe can be read only once, and the picture must show the image that was sent.
        source = Source(names[0])
        there = names[0] == STDIN or os.path.exists(names[0])  # noqa: PTH110
        neck = client.features(cast("BinaryIO", source) if there else names[0])["neck"]
        model = client.model()  # afterwards: the one that produced the result
    if output is not None:
        metadata = {"image": escaped(names[0]), "model": describe(model)}
        with replacing(output) as temporary:
            _save(temporary, output.suffix, neck, metadata)
        print(f"{output}: neck {' × '.join(map(str, neck.shape))} float32")
    if options.picture:
        try:
            photo = decoded(io.BytesIO(source.data))
        except Exception as failure:  # Pillow raises nearly anything
            error(f"{shortened(names[0])}: no picture: Pillow cannot read it here ({failure})")
            return IMAGES_FAILED
        picture(photo, neck, Path(options.picture))
        print(f"{options.picture}: the image, and its first three principal components")
    return IMAGES_FAILED if told else OK


def _save(path: Path, suffix: str, neck: Array, metadata: dict[str, str]) -> None:
    if suffix == ".safetensors":
        write_safetensors(path, "neck", neck.shape, [neck], metadata)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            add_array(archive, "neck.npy", neck)
            for key, value in metadata.items():
                add_array(archive, f"{key}.npy", np.array(value))


def picture(photo: Image.Image, neck: Array, path: Path) -> None:
    """Write `photo` and, to its right, its patches, coloured so that those with similar vectors
    have similar colours."""
    scale = min(_HEIGHT / photo.height, _MOST_WIDTH / photo.width)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    colours = Image.fromarray(principal_colours(neck))
    both = Image.new("RGB", (2 * size[0], size[1]))
    both.paste(photo.resize(size, Image.Resampling.LANCZOS), (0, 0))
    both.paste(colours.resize(size, Image.Resampling.NEAREST), (size[0], 0))
    write_picture(both, path)


def principal_colours(neck: Array) -> npt.NDArray[np.uint8]:
    """float32 [D, h, w] to uint8 [h, w, 3]: the first three principal components of the patches
    as red, green and blue, each stretched from its 2nd to its 98th percentile."""
    depth, height, width = neck.shape
    patches = neck.reshape(depth, -1).T
    patches = patches - patches.mean(0)
    _, _, directions = np.linalg.svd(patches, full_matrices=False)
    components = np.zeros((len(patches), 3), np.float32)
    found = min(3, len(directions))
    components[:, :found] = patches @ directions[:found].T
    # The sign of a component is arbitrary; fix it, so that the same map gets the same colours.
    components *= np.where(np.sum(components**3, axis=0) < 0, -1, 1)
    low, high = np.percentile(components, [2, 98], axis=0)
    scaled = np.clip((components - low) / np.maximum(high - low, 1e-6), 0, 1)
    colours: npt.NDArray[np.uint8] = (255 * scaled).round().astype(np.uint8)
    return colours.reshape(height, width, 3)
