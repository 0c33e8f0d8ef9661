"""`similar`: the images in a file of embeddings that are most similar to a query image."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .._sync import Client
from ..errors import ConfigurationError, ModelChanged, shortened
from ..types import ImageLike
from . import _tables
from ._common import OK, connect, escaped
from ._embed import describe, described
from ._inputs import Source, image
from ._pictures import check_picture
from ._sheet import Sheet
from ._show import print_json

Array = npt.NDArray[np.float32]


def similar(options: Namespace) -> int:
    """Print the best matches, best first; returns the exit code."""
    images, embeddings, model = _tables.read(Path(options.to))
    if options.sheet is not None:
        check_picture(Path(options.sheet), [options.query, *images])
    asked = image(options.query, kept=options.sheet is not None)
    with connect(options) as client:
        query = _embed(client, options, asked, model)
    if embeddings.shape[1] != len(query):
        raise ConfigurationError(
            f"{shortened(options.to)} has embeddings {list(embeddings.shape)}, the server's model "
            f"gives {len(query)} numbers"
        )
    matches = best(query, embeddings, options.number)
    for row, cosine in matches:
        if options.json:
            print_json({"image": escaped(images[row]), "cosine": cosine})
        else:
            print(f"{cosine:7.4f}  {images[row]}")
    if options.sheet is not None:
        names = [options.query, *(images[row] for row, _ in matches)]
        sheet = Sheet(Path(options.sheet), names, lines=1)
        sheet.add(cast("str | Source", asked), [("query", "")], marked=True)
        for row, cosine in matches:
            sheet.add(images[row], [("cosine", f"{cosine:.4f}")])
        sheet.save()
    return OK


def _embed(client: Client, options: Namespace, asked: ImageLike, model: str) -> Array:
    """The query's embedding, by the model that produced those of the file.

    Raises:
        ConfigurationError: The server has another model.
    """
    told = described(model)
    version = str(told.get("model_version", ""))
    try:
        stream = client.stream([asked], model_version=version or None)
        query: Array = next(stream).result
    except ModelChanged:
        same = False
    else:
        # Older releases of vit-client wrote no version; other programs may write no model at all.
        same = bool(version) or not model or told == _older(describe(client.model()))
    if not same:
        raise ConfigurationError(
            f"{shortened(options.to)} is from another model than the server's, and embeddings of "
            f"two models cannot be compared ({shortened(model)}; the server's: "
            f"{shortened(describe(client.model()))})"
        )
    return query


def _older(model: str) -> dict[str, Any]:
    return {name: value for name, value in described(model).items() if name != "model_version"}


def best(query: Array, embeddings: Array, number: int) -> list[tuple[int, float]]:
    """Row and cosine similarity of the `number` embeddings [N, D] nearest to `query` [D]."""
    lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(query)
    cosines = embeddings @ query / np.maximum(lengths, 1e-12)
    rows = np.argsort(-cosines, kind="stable")[:number]
    return [(int(row), round(float(cosines[row]), 6)) for row in rows]
