"""`embed -o`: the embeddings of many images into one file, resumable."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from .._sync import Client
from ..types import Model
from . import _tables
from ._common import IMAGES_FAILED, OK, Images, connect, escaped, progress, warn_if_untrained
from ._inputs import STDIN, expand
from ._journal import Journal
from ._report import error, note


def embed_to_file(options: Namespace) -> int:
    """Embed all images into `options.output`; returns the exit code.

    Answers go to a journal beside the output first. An interrupted run leaves it there and the
    same command goes on from it; the output itself appears whole or not at all.
    """
    output = Path(options.output)
    _tables.check(output)
    names = expand(options.images)
    with connect(options) as client:
        warn_if_untrained(client)
        model = client.model()
        journal = Journal(output, describe(model))
        try:
            failed = _embed_missing(client, names, journal)
            good = [name for name in names if name not in failed]
            if good:
                blocks = lambda: journal.blocks(good, _tables.BLOCK)  # noqa: E731
                images = [escaped(name) for name in good]
                table = _tables.Table(images, model.embedding_size, blocks, describe(model))
                _tables.write(output, table)
        except BaseException:
            journal.close()
            note(f"{journal.path} keeps what was done: the same command goes on from there")
            raise
        journal.delete()
    if good:
        print(f"{output}: {len(good)} × {model.embedding_size} float32")
    return IMAGES_FAILED if failed else OK


def describe(model: Model) -> str:
    """What has to be the same for embeddings to be comparable."""
    return json.dumps(
        {"name": model.name, "weights_sha256": model.weights_sha256, "size": model.embedding_size}
    )


def _embed_missing(client: Client, names: Sequence[str], journal: Journal) -> set[str]:
    """Fill the journal; returns the names that failed."""
    done = journal.done(names) - {STDIN}
    missing = [name for name in names if name not in done]
    if done:
        note(f"resuming: {len(done)} of {len(names)} images are done already")
    failed = set()
    bar = progress(output_on_stdout=False)
    stream = client.stream(Images(missing), task="embed", on_error="return", progress=bar)
    for item, name in zip(stream, missing, strict=True):
        if item.error is None:
            journal.add(name, item.result)
        else:
            error(f"{name}: {item.error.reason}")
            failed.add(name)
    sys.stderr.flush()
    return failed
