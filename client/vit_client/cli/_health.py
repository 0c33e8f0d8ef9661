"""`health`: whether the server works, and what it serves."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict

from ..errors import VitClientError
from ..types import Health, Model
from ._common import NO_ANSWER, OK, REFUSED, connect
from ._report import error


def health(options: Namespace) -> int:
    """Print the result; returns the exit code."""
    with connect(options) as client:
        found = client.health(timeout=options.timeout or 5.0)
        model = None
        if found:
            try:
                model = client.model()
            except VitClientError as failure:  # it responds, but serves other models
                error(str(failure))
    if options.json:
        print(json.dumps({**asdict(found), "model": asdict(model) if model else None}))
    else:
        _print(found, model)
    if not found:
        return NO_ANSWER
    return OK if model else REFUSED


def _print(found: Health, model: Model | None) -> None:
    if found.latency is not None:
        print(f"answering  yes, one image in {found.latency * 1e3:.1f} ms")
    else:
        print(f"answering  no: {found.problem}")
    if found.live:
        print(f"server     {found.server}, {'ready' if found.ready else 'not ready'}")
    if model:
        height, width = model.image_size
        print(f"model      {model.name} version {model.version}, {model.precision}")
        print(f"built by   vit-builder {model.builder_version or '(unknown version)'}")
        print(f"weights    {'trained' if model.trained else 'random: labels are meaningless'}")
        print(f"image      {width} × {height} pixels, up to {model.max_batch_size} in a request")
        print(
            f"answers    {model.classes} classes, {model.embedding_size} numbers, "
            f"map of {' × '.join(map(str, model.feature_shape))}"
        )
