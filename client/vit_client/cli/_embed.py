"""`embed -o`: writes the embeddings and classes of many images to one file; resumable."""

from __future__ import annotations

import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._sync import Client
from ..errors import ConfigurationError, ModelChanged, shortened
from ..types import Analysis, Model, Task
from . import _tables
from ._common import (
    IMAGES_FAILED,
    OK,
    connect,
    escaped,
    progress,
    warn_if_untrained,
)
from ._inputs import STDIN, Images, expand
from ._journal import Journal, left_model
from ._report import error, note


def embed_to_file(options: Namespace) -> int:
    """Embed all images into `options.output`; returns the exit code.

    Results first go to a journal next to the output. An interrupted run leaves the journal and the
    same command resumes from it; the output itself is written atomically.
    """
    output, top_k = Path(options.output), options.top_k or 0
    _tables.check(output, classes=top_k > 0)
    names, told = expand(options)
    if not options.overwrite:
        _keep_other_images(output, names)
    with connect(options) as client:
        warn_if_untrained(client)
        model = _model(client, output)
        if top_k > model.max_top_k:  # before the journal drops results of another top_k
            raise ConfigurationError(f"--top-k must be from 1 to {model.max_top_k}, not {top_k}")
        journal = Journal(output, describe(model), top_k)
        try:
            failed = _embed_missing(client, names, journal, top_k, model.version)
            good = [name for name in names if name not in failed]
            if good:
                if not options.overwrite:
                    _keep_other_images(output, good)
                blocks = lambda: journal.blocks(good, _tables.BLOCK)  # noqa: E731
                images = [escaped(name) for name in good]
                width = model.embedding_size
                table = _tables.Table(images, width, top_k, blocks, describe(model))
                _tables.write(output, table)
        except BaseException as failure:
            journal.close()
            note(_kept(journal, gone=isinstance(failure, ModelChanged)))
            raise
        journal.delete()
    if good:
        classes = "best class" if top_k == 1 else f"{top_k} best classes"
        with_classes = f", and the {classes} of each" if top_k else ""
        print(f"{output}: {len(good)} × {model.embedding_size} float32{with_classes}")
    return IMAGES_FAILED if failed or told else OK


def _model(client: Client, output: Path) -> Model:
    """The model of an interrupted run's results, if it is still served: several models may be
    served behind one name."""
    version = str(described(left_model(output)).get("model_version", ""))
    if version:
        with contextlib.suppress(ModelChanged):
            return client.model(model_version=version)
    return client.model()


def _kept(journal: Journal, *, gone: bool) -> str:
    kept = f"{shortened(journal.path)} keeps the results so far"
    if gone:
        return (
            f"{kept}: delete it to start over with the current model, or resume with the same "
            "command and the --url of a server with the previous one"
        )
    return f"{kept}: the same command resumes from there"


def _keep_other_images(output: Path, names: Sequence[str]) -> None:
    """Raise ConfigurationError if `output` has images that are not among `names`."""
    try:
        if output.stat().st_size == 0:
            return
    except OSError:
        return  # does not exist; other errors are reported on writing
    try:
        held = _tables.read_images(output)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}; --overwrite replaces it") from None
    # Standard input is another image each time.
    lost = sorted(set(held) - {escaped(name) for name in names if name != STDIN})
    if lost:
        raise ConfigurationError(
            f"{shortened(output)} has {len(lost)} images that this run of {len(names)} does not "
            f"include, for example {shortened(lost[0])}; --overwrite replaces it (xargs runs the "
            "command once for each batch: give all names to one run, with --files-from -)"
        )


def describe(model: Model) -> str:
    """The model of the numbers in a file, as JSON."""
    return json.dumps(
        {
            "name": model.name,
            "weights_sha256": model.weights_sha256,
            "size": model.embedding_size,
            "model_version": model.version,
        }
    )


def described(text: str) -> dict[str, Any]:
    """Parse what `describe` wrote; empty if it is anything else."""
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    return told if isinstance(told, dict) else {}


def _embed_missing(
    client: Client, names: Sequence[str], journal: Journal, top_k: int, version: str
) -> set[str]:
    """Fill the journal with results of one model; returns the names that failed.

    Raises:
        ModelChanged: The model was replaced during the run.
    """
    done = journal.done(names) - {STDIN}
    missing = [name for name in names if name not in done]
    if done:
        note(f"resuming: {len(done)} of {len(names)} images are already done")
    failed = set()
    bar = progress(output_on_stdout=False)
    task: Task = "analyze" if top_k else "embed"
    stream = client.stream(
        Images(missing),
        task=task,
        top_k=top_k,
        on_error="return",
        progress=bar,
        model_version=version or None,
    )
    versions = set()
    for item, name in zip(stream, missing, strict=True):
        if item.error is None:
            versions.add(item.model_version)
            if len(versions) > 1:  # not raised by stream: the first model has no version
                raise ModelChanged(f"{client.model().name}: another model is now served")
            journal.add(name, item.result if top_k else Analysis([], item.result))
        else:
            error(f"{shortened(name)}: {item.error.reason}")
            failed.add(name)
    sys.stderr.flush()
    return failed
