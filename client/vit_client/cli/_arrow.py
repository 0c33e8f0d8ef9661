"""Parquet and Arrow files with a column of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

from ..errors import ConfigurationError, shortened
from ._remote import is_url, opened
from ._sample import CutShort, Sample, Unusable
from ._tables import pyarrow

# Rows that are in memory at a time.
_ROWS = 8


def samples(
    shard: str, file: IO[bytes], keep: Sequence[str], image_column: str | None
) -> Iterator[Sample]:
    pa = pyarrow()
    try:
        schema, batches = _batches(shard, file)
    except (pa.ArrowException, OSError) as failure:
        if isinstance(failure, OSError) and failure.errno:
            raise
        raise CutShort(f"cannot be read ({failure})") from None
    column = image_column or _image_column(shard, schema)
    if missing := [name for name in (column, *keep) if name not in schema.names]:
        raise ConfigurationError(
            f"{shortened(shard)} has no column {missing[0]!r}, but {', '.join(schema.names)}"
        )
    if not _has_images(kind := schema.field(column).type):
        raise ConfigurationError(
            f"{shortened(shard)}: column {column!r} is of {kind}, not bytes, or a struct of them"
        )
    row = 0
    try:
        for batch in batches:
            for values in batch.select(list(dict.fromkeys([column, *keep]))).to_pylist():
                image: Any = values[column]
                path = image.get("path") if isinstance(image, dict) else None
                image = image.get("bytes") if isinstance(image, dict) else image
                data = image if isinstance(image, bytes) and image else Unusable("has no bytes")
                yield Sample(path or str(row), data, {name: values[name] for name in keep})
                row += 1
    except (pa.ArrowException, OSError) as failure:
        if isinstance(failure, OSError) and failure.errno:
            raise
        raise CutShort(f"is cut short or damaged after row {row} ({failure})") from None


def _batches(shard: str, file: IO[bytes]) -> tuple[Any, Iterator[Any]]:
    """The schema, and record batches of a few rows."""
    pa = pyarrow()
    if shard.lower().endswith(".parquet"):
        # Through a buffer, page by page: a row group may have gigabytes of images.
        parquet = pyarrow("parquet").ParquetFile(file, buffer_size=1 << 20)
        return parquet.schema_arrow, parquet.iter_batches(batch_size=_ROWS)
    if not is_url(shard):
        file = pa.memory_map(shard)
    try:
        stored = pa.ipc.open_file(file)
        whole = (stored.get_batch(number) for number in range(stored.num_record_batches))
    except pa.ArrowInvalid:  # Hugging Face's datasets are streams
        file.seek(0)
        stored = whole = pa.ipc.open_stream(file)
    return stored.schema, (
        batch.slice(start, _ROWS) for batch in whole for start in range(0, len(batch), _ROWS)
    )


def column_type(shard: str, name: str) -> Any:
    """The Arrow type of a column."""
    pa = pyarrow()
    try:
        with opened(shard) as file:
            schema, _ = _batches(shard, file)
    except (pa.ArrowException, OSError):  # told when its rows are read
        return pa.null()
    return schema.field(name).type if name in schema.names else pa.null()


def _image_column(shard: str, schema: Any) -> str:
    """The one column of bytes, or of Hugging Face's structs of bytes and path."""
    found: list[str] = [each.name for each in schema if _has_images(each.type)]
    if "image" in found:
        return "image"
    if len(found) != 1:
        which = f"several ({', '.join(found)})" if found else f"none ({', '.join(schema.names)})"
        raise ConfigurationError(
            f"{shortened(shard)}: which column has the images? By their types {which} could: "
            "choose with --image-column"
        )
    return found[0]


def _has_images(kind: Any) -> bool:
    types = pyarrow("types")
    if types.is_struct(kind):
        return any(each.name == "bytes" and _has_images(each.type) for each in kind)
    if types.is_dictionary(kind):
        return _has_images(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
