"""`similar`: the images in a file of embeddings that are most like a query image."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError, shortened
from . import _tables
from ._common import OK, connect, escaped
from ._embed import describe
from ._inputs import image
from ._report import warning
from ._show import print_json

Array = npt.NDArray[np.float32]


def similar(options: Namespace) -> int:
    """Print the best matches, best first; returns the exit code."""
    images, embeddings, model = _tables.read(Path(options.to))
    with connect(options) as client:
        query = client.embed(image(options.query))
        current = describe(client.model())
    if embeddings.shape[1] != len(query):
        raise ConfigurationError(
            f"{shortened(options.to)} has embeddings {list(embeddings.shape)}, the server's model "
            f"gives {len(query)} numbers"
        )
    if model and model != current:
        warning(
            f"{shortened(options.to)} is of another model ({shortened(model)}): its numbers mean "
            "something else"
        )
    for row, cosine in best(query, embeddings, options.number):
        if options.json:
            print_json({"image": escaped(images[row]), "cosine": cosine})
        else:
            print(f"{cosine:7.4f}  {images[row]}")
    return OK


def best(query: Array, embeddings: Array, number: int) -> list[tuple[int, float]]:
    """Row and cosine of the `number` embeddings [N, D] that are nearest to `query` [D]."""
    lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(query)
    cosines = embeddings @ query / np.maximum(lengths, 1e-12)
    rows = np.argsort(-cosines, kind="stable")[:number]
    return [(int(row), round(float(cosines[row]), 6)) for row in rows]
