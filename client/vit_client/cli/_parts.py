"""`embed SHARDS -o FOLDER/`: a folder of Parquet files, written part by part; resumable."""

from __future__ import annotations

import contextlib
import json
import re
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .._sync import Client
from ..errors import ConfigurationError, shortened
from ..types import Model
from . import _shards
from ._common import (
    IMAGES_FAILED,
    OK,
    CannotWrite,
    connect,
    escaped,
    progress,
    reason,
    warn_if_untrained,
)
from ._embed import describe
from ._part_folder import PartFolder
from ._report import error, note, warning
from ._sample import CutShort
from ._tables import pyarrow

# Rows of a part, and of a row group in it. A killed run repeats at most one part of each shard.
PART = 10_000
GROUP = 1_000

# Kept bytes (a video of each sample, say) in memory before a row group is written.
_GROUP_BYTES = 32 << 20

# Before this many rows a share of failures says little.
_FIRST = 100


@dataclass
class _Run:
    """What all parts of a run have in common."""

    folder: PartFolder
    model: Model
    keep: list[str]
    dtype: str
    image_column: str | None
    _fingerprints: dict[str, str] = field(default_factory=dict)  # read once a shard, not a part

    def about(self, shard: str) -> dict[str, str]:
        """What decides the contents of a shard's parts, to tell whether they may be kept."""
        settings = [self.keep, self.dtype, self.image_column]
        if shard not in self._fingerprints:
            self._fingerprints[shard] = _shards.fingerprint(shard)
        return {
            "model": describe(self.model),
            "settings": json.dumps(settings),
            "shard": self._fingerprints[shard],
        }


@dataclass
class _Report:
    rows: int = 0
    parts: int = 0
    kept: int = 0  # rows of parts that were there already
    kept_failed: int = 0
    seen: set[str] = field(default_factory=set)  # kept fields that a sample has had
    failures: Counter[str] = field(default_factory=Counter)
    begun: float = field(default_factory=time.monotonic)

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def failure(self, name: str, why: str) -> None:
        error(f"{shortened(name)}: {why}")
        self.failures[re.sub(r"\d+(\.\d+)?", "N", why)] += 1

    def tell(self) -> None:
        seconds = time.monotonic() - self.begun
        rate = f", {self.rows / seconds:.1f} images/s" if self.rows else ""
        before = f", and {self.kept_failed} of {self.kept} before" if self.kept else ""
        note(
            f"{self.rows} rows in {seconds:.0f} s{rate}; {self.failed} without an embedding{before}"
        )
        for why, count in self.failures.most_common(10):
            note(f"{count:6} × {why}")


class TooManyFailures(Exception):
    """The run has been ended by --max-failures."""


def embed_to_folder(options: Namespace) -> int:
    """Embed the images of all shards into parts in `options.output`; returns the exit code."""
    pyarrow("parquet")
    shards = _shards.expand(options.images)[_share(options.part)]
    folder = PartFolder(options.output)
    report = _Report()
    with connect(options) as client:
        warn_if_untrained(client)
        model = client.model()
        run = _Run(folder, model, options.keep, options.dtype, options.image_column)
        try:
            _embed(client, run, _left(run, shards, report), report, _limit(options.max_failures))
        except TooManyFailures as end:
            error(str(end))
            return IMAGES_FAILED
        except BaseException:
            if report.parts:
                kept = f"{shortened(folder.name)} keeps the parts so far"
                note(f"{kept}: the same command resumes from there")
            raise
        finally:
            report.tell()
    for name in set(run.keep) - report.seen if report.rows else ():
        warning(f"no image has a field {name!r}")
    rows = report.kept + report.rows
    print(f"{folder.name}: {report.parts} parts, {rows} × {model.embedding_size} {run.dtype}")
    return IMAGES_FAILED if report.failed + report.kept_failed else OK


def _share(part: str | None) -> slice:
    """--part I/N: every N-th shard, from the I-th."""
    if part is None:
        return slice(None)
    number, count = map(int, part.split("/"))
    return slice(number - 1, None, count)


def _limit(text: str | None) -> Any:
    """--max-failures: a function of rows and failures that tells whether these are too many."""
    if text is None:
        return lambda _rows, _failed: False
    if text.endswith("%"):
        share = float(text[:-1]) / 100
        return lambda rows, failed: rows >= _FIRST and failed > share * rows
    return lambda _rows, failed: failed > int(text)


# -- what is there already ---------------------------------------------------------------------


def _name(shard: str, part: int) -> str:
    return f"{_shards.stem(shard)}-{part:05}.parquet"


def _left(run: _Run, shards: Sequence[str], report: _Report) -> list[tuple[str, int]]:
    """The shards that are not done, each with the part to go on with."""
    left = []
    for shard in shards:
        about, part, done = run.about(shard), 0, False
        while not done and run.folder.has(name := _name(shard, part)):
            found = _metadata(run.folder, name, about)
            if found["damaged"] == "1":  # it may have been mended
                break
            report.kept += int(found["rows"])
            report.kept_failed += int(found["failures"])
            done = found["last"] == "1"
            part += 1
        report.parts += part
        if not done:
            left.append((shard, part))
    if report.parts:
        note(
            f"resuming: {report.parts} parts are already there, {len(left)} of {len(shards)} "
            "shards are left"
        )
    return left


def _metadata(folder: PartFolder, part: str, about: dict[str, str]) -> dict[str, str]:
    """What the last of `_Writer.finish` wrote of a part.

    Raises:
        ConfigurationError: It is not of a run like this one.
    """
    path = f"{folder.name}/{part}"
    try:
        with folder.open(part) as file:
            raw = pyarrow("parquet").read_metadata(file).metadata or {}
    except (OSError, pyarrow().ArrowException) as failure:
        why = f"{shortened(path)} cannot be read ({failure}): delete it"
        raise ConfigurationError(why) from None
    found = {name.decode(): value.decode() for name, value in raw.items()}
    for name, value in about.items():
        mended = name == "shard" and found.get("damaged") == "1"
        if found.get(name) != value and not mended:
            what = {
                "model": "another model",
                "settings": "another --keep, --dtype or --image-column",
                "shard": "another shard of this name, or it has changed",
            }[name]
            raise ConfigurationError(
                f"{shortened(path)} is of {what}: use another folder, or delete the shard's parts"
            )
    return found


# -- the work ----------------------------------------------------------------------------------


@dataclass
class _Row:
    """A sample that is being embedded."""

    shard: str
    key: str
    kept: dict[str, Any]


@dataclass
class _End:
    """Comes after the last row of a part."""

    shard: str
    part: int
    last: bool
    problem: CutShort | None = None


def _embed(
    client: Client, run: _Run, left: list[tuple[str, int]], report: _Report, too_many: Any
) -> None:
    waiting: deque[_Row | _End] = deque()
    writer = _Writer(run)
    stream = client.stream(
        _read(run, left, waiting),
        on_error="return",
        progress=progress(output_on_stdout=False),
        model_version=run.model.version or None,
    )
    with contextlib.closing(writer), contextlib.closing(stream):
        items = iter(stream)
        while True:
            try:
                item = next(items, None)
            finally:  # also where a later shard ends the run
                _end_parts(waiting, writer, report)
                _check_failures(report, too_many)
            if item is None:
                return
            row = waiting.popleft()
            assert isinstance(row, _Row)
            report.rows += 1
            report.seen.update(row.kept)
            why = item.error.reason if item.error else ""
            if why:
                report.failure(f"{row.shard}: {row.key}", why)
            writer.add(row, None if item.error else item.result, why)
            _check_failures(report, too_many)


def _check_failures(report: _Report, too_many: Any) -> None:
    if too_many(report.rows, report.failed):
        raise TooManyFailures(
            f"ended by --max-failures: {report.failed} failures in {report.rows} images"
        )


def _read(run: _Run, left: list[tuple[str, int]], waiting: deque[_Row | _End]) -> Iterator[Any]:
    """The images, and in `waiting`, in the same order, what they belong to."""
    for shard, first in left:
        part, rows = first, 0
        problem: CutShort | None = None
        most = run.model.max_request_bytes
        try:
            found = _shards.samples(shard, run.keep, run.image_column, most)
            for sample in islice(found, first * PART, None):
                if rows == PART:  # only now is it known not to be the last one
                    waiting.append(_End(shard, part, last=False))
                    part, rows = part + 1, 0
                rows += 1
                waiting.append(_Row(shard, escaped(sample.key), sample.kept))
                yield sample.image
        except CutShort as failure:
            problem = failure
        waiting.append(_End(shard, part, last=True, problem=problem))


def _end_parts(waiting: deque[_Row | _End], writer: _Writer, report: _Report) -> None:
    while waiting and isinstance(end := waiting[0], _End):
        waiting.popleft()
        if end.problem and not end.problem.told:
            report.failure(end.shard, str(end.problem))
        report.parts += 1
        writer.finish(end)


class _Writer:
    """Writes one part after the other, each under another name until it is complete."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._rows: list[tuple[_Row, Any, str]] = []
        self._count = self._failed = self._bytes = 0
        self._file: Any = None
        self._schema: Any = None
        self._path = Path()

    def add(self, row: _Row, embedding: Any, why: str) -> None:
        """Append a row; `embedding` is None if it has an error."""
        self._rows.append((row, embedding, why))
        self._count += 1
        self._failed += bool(why)
        self._bytes += sum(len(v) for v in row.kept.values() if isinstance(v, (str, bytes)))
        if len(self._rows) == GROUP or self._bytes > _GROUP_BYTES:
            self._write(row.shard)

    def finish(self, end: _End) -> None:
        """Complete the part. An empty shard has an empty one."""
        self._write(end.shard)
        self._file.add_key_value_metadata(
            {
                "last": str(int(end.last)),
                "rows": str(self._count),
                "failures": str(self._failed),
                "damaged": str(int(end.problem is not None)),
                "problem": str(end.problem or ""),
            }
        )
        with _told(self._path):
            self._file.close()
            self._run.folder.publish(self._path, _name(end.shard, end.part))
        self._file, self._count, self._failed = None, 0, 0

    def close(self) -> None:
        """Drop a part that is not complete."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._run.folder.drop(self._path)

    def _write(self, shard: str) -> None:
        pa = pyarrow()
        with _told(self._path):
            if self._file is None:
                self._path = self._run.folder.partial()
                self._schema = self._columns(shard)
                self._file = pyarrow("parquet").ParquetWriter(self._path, self._schema)
            if not self._rows:
                return
            rows, self._rows, self._bytes = self._rows, [], 0
            width = self._run.model.embedding_size
            # Parquet has no missing list of a fixed size (Arrow: "not supported").
            numbers = np.full((len(rows), width), np.nan, self._run.dtype)
            for number, (_, embedding, _) in enumerate(rows):
                if embedding is not None:
                    numbers[number] = embedding
            columns = {
                "shard": [row.shard.rpartition("/")[2] for row, _, _ in rows],
                "key": [row.key for row, _, _ in rows],
                **{name: [row.kept.get(name) for row, _, _ in rows] for name in self._run.keep},
                "embedding": pa.FixedSizeListArray.from_arrays(numbers.ravel(), width),
                "model_version": [self._run.model.version] * len(rows),
                "error": [why or None for _, _, why in rows],
            }
            self._file.write_table(pa.table(columns, schema=self._schema))

    def _columns(self, shard: str) -> Any:
        pa = pyarrow()
        number = pa.float16() if self._run.dtype == "float16" else pa.float32()
        kept = [(name, _shards.column_type(shard, name)) for name in self._run.keep]
        return pa.schema(
            [
                ("shard", pa.string()),
                ("key", pa.string()),
                *kept,
                ("embedding", pa.list_(number, self._run.model.embedding_size)),
                ("model_version", pa.string()),
                ("error", pa.string()),
            ],
            metadata=self._run.about(shard),
        )


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise CannotWrite(f"{shortened(path)} cannot be written ({reason(failure)})") from None
