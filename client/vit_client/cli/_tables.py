"""Files of embeddings, with or without classes: .npz, .safetensors and .parquet."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError, shortened
from ..types import Prediction
from ._common import reason
from ._files import check_place, replacing

Array = npt.NDArray[np.float32]

# Rows per block: embeddings are written in blocks, because they may not fit in memory.
BLOCK = 4096

_FORMAT: Any = np.lib.format  # some versions of numpy have no types for it


class Block(NamedTuple):
    """Some rows of a table."""

    embeddings: Array
    """[n, width]."""
    predictions: list[list[Prediction]]
    """The best classes of each row, best first; empty if the table has none."""


@dataclass(frozen=True)
class Table:
    """A table of embeddings to write."""

    images: Sequence[str]
    """One name per row."""
    width: int
    """Embedding size, in numbers."""
    top_k: int
    """Classes per row; 0 for a table without."""
    blocks: Callable[[], Iterable[Block]]
    """All rows, in blocks; may be called more than once."""
    model: str
    """The model that produced them, as JSON."""


def check(path: Path, *, classes: bool) -> None:
    """Like `check_place`; also raises ConfigurationError for an unknown format, for one that cannot
    hold `classes` if they are wanted, and for one whose package is not installed."""
    if path.suffix not in _FORMATS:
        raise ConfigurationError(f"{shortened(path)}: the name must end in {', '.join(_FORMATS)}")
    if classes and path.suffix == ".safetensors":
        raise ConfigurationError(
            f"{shortened(path)}: .safetensors cannot store text, and so no classes: with --top-k "
            "the name must end in .npz or .parquet"
        )
    if path.suffix == ".parquet":
        pyarrow("parquet")
    check_place(path)


def write(path: Path, table: Table) -> None:
    """Write `table` in the format of the suffix."""
    with replacing(path) as temporary:
        _FORMATS[path.suffix].write(temporary, table)


def read(path: Path) -> tuple[list[str], Array, str]:
    """Images, embeddings float32 [N, D] and model of a file that `write` wrote.

    Raises:
        ConfigurationError: The file does not exist, or has another format.
    """
    with _errors_told(path):
        form = _FORMATS.get(path.suffix)
        images, embeddings, model = form.read(path) if form else _read_parts(path)
        if embeddings.ndim != 2 or len(images) != len(embeddings):
            raise ValueError(f"{len(images)} names for {list(embeddings.shape)} numbers")
        # A file of another program may have numbers as names.
        return list(map(str, images)), embeddings.astype(np.float32, copy=False), model


def read_images(path: Path) -> list[str]:
    """The images only, in little time and memory; raises like `read`."""
    with _errors_told(path):
        return _FORMATS[path.suffix].read_images(path)


@contextlib.contextmanager
def _errors_told(path: Path) -> Iterator[None]:
    if path.suffix not in _FORMATS and not path.is_dir():
        raise ConfigurationError(f"{shortened(path)}: the name must end in {', '.join(_FORMATS)}")
    try:
        yield
    except ConfigurationError:  # no pyarrow
        raise
    except OSError as error:
        raise ConfigurationError(f"{shortened(path)}: {reason(error)}") from None
    except Exception as error:  # numpy and pyarrow raise nearly anything for a foreign file
        why = shortened(str(error) or type(error).__name__)
        raise ConfigurationError(f"{shortened(path)} is not a file of embeddings ({why})") from None


def write_safetensors(
    path: Path,
    name: str,
    shape: Sequence[int],
    blocks: Iterable[Array],
    metadata: dict[str, str],
) -> None:
    """One float32 tensor. The format is a JSON header followed by the numbers."""
    size = 4 * int(np.prod(shape, dtype=np.int64))
    tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, name: tensor}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f4").data)


def _write_safetensors(path: Path, table: Table) -> None:
    metadata = {"images": json.dumps(list(table.images)), "model": table.model}
    shape = (len(table.images), table.width)
    embeddings = (block.embeddings for block in table.blocks())
    write_safetensors(path, "embeddings", shape, embeddings, metadata)


def _read_safetensors(path: Path) -> tuple[list[str], Array, str]:
    with path.open("rb") as file:
        header = _safetensors_header(file)
        shape = header["embeddings"]["shape"]
        numbers = np.fromfile(file, "<f4", int(np.prod(shape)))
    metadata = header["__metadata__"]
    return json.loads(metadata["images"]), numbers.reshape(shape), metadata.get("model", "")


def _read_safetensors_images(path: Path) -> list[str]:
    with path.open("rb") as file:
        images: list[str] = json.loads(_safetensors_header(file)["__metadata__"]["images"])
    return images


def _safetensors_header(file: IO[bytes]) -> Any:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError("its header is longer than the file")
    return json.loads(file.read(length))


def _write_npz(path: Path, table: Table) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        shape = (len(table.images), table.width)
        embeddings = (block.embeddings for block in table.blocks())
        _add_blocks(archive, "embeddings.npy", "<f4", shape, embeddings)
        if table.top_k:
            _add_classes(archive, table)
        add_array(archive, "images.npy", np.array(table.images, dtype=np.str_))
        add_array(archive, "model.npy", np.array(table.model))


def _add_classes(archive: zipfile.ZipFile, table: Table) -> None:
    """labels, indices and scores, each [N, top_k]. numpy pads strings to the longest one, so its
    length has to be known first."""
    shape = (len(table.images), table.top_k)
    longest = max(
        len(guess.label)
        for block in table.blocks()
        for guesses in block.predictions
        for guess in guesses
    )
    for name, field, dtype in (
        ("labels.npy", "label", f"<U{longest or 1}"),
        ("indices.npy", "index", "<i4"),
        ("scores.npy", "score", "<f4"),
    ):
        values = (
            [[getattr(guess, field) for guess in row] for row in block.predictions]
            for block in table.blocks()
        )
        _add_blocks(archive, name, dtype, shape, values)


def _add_blocks(
    archive: zipfile.ZipFile,
    name: str,
    dtype: str,
    shape: tuple[int, int],
    blocks: Iterable[npt.ArrayLike],
) -> None:
    """Write one member of a .npz file, which may be larger than memory."""
    with archive.open(name, "w", force_zip64=True) as file:
        head = {"descr": dtype, "fortran_order": False, "shape": shape}
        _FORMAT.write_array_header_1_0(file, head)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).tobytes())


def add_array(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    """Write one member of a .npz file. Not `np.savez`: on a full disk it leaves the file open."""
    file: IO[bytes]
    with archive.open(name, "w", force_zip64=True) as file:
        _FORMAT.write_array(file, array, allow_pickle=False)


def _read_npz(path: Path) -> tuple[list[str], Array, str]:
    with np.load(path, allow_pickle=False) as arrays:
        model = str(arrays["model"]) if "model" in arrays else ""
        return arrays["images"].tolist(), arrays["embeddings"], model


def _read_npz_images(path: Path) -> list[str]:
    with np.load(path, allow_pickle=False) as arrays:
        images: list[str] = arrays["images"].tolist()
    return images


def _write_parquet(path: Path, table: Table) -> None:
    pa, pq = pyarrow(), pyarrow("parquet")
    fields = [("image", pa.string()), ("embedding", pa.list_(pa.float32(), table.width))]
    if table.top_k:
        guess = [("label", pa.string()), ("index", pa.int32()), ("score", pa.float32())]
        fields.append(("predictions", pa.list_(pa.struct(guess))))
    schema = pa.schema(fields, metadata={"model": table.model})
    start = 0
    with pq.ParquetWriter(path, schema) as writer:
        for block in table.blocks():
            end = start + len(block.embeddings)
            columns = [
                pa.array(table.images[start:end], pa.string()),
                pa.FixedSizeListArray.from_arrays(block.embeddings.ravel(), table.width),
            ]
            if table.top_k:
                guesses = [[vars(guess) for guess in row] for row in block.predictions]
                columns.append(pa.array(guesses, schema.field("predictions").type))
            writer.write_batch(pa.record_batch(columns, schema=schema))
            start = end


def _read_parquet(path: Path) -> tuple[list[str], Array, str]:
    table = pyarrow("parquet").read_table(path, columns=["image", "embedding"])
    column = table["embedding"].combine_chunks()
    model = (table.schema.metadata or {}).get(b"model", b"").decode()
    numbers = column.flatten().to_numpy().reshape(len(table), -1)
    return table["image"].to_pylist(), numbers, model


def _read_parquet_images(path: Path) -> list[str]:
    table = pyarrow("parquet").read_table(path, columns=["image"])
    images: list[str] = table["image"].to_pylist()
    return images


def _read_parts(path: Path) -> tuple[list[str], Array, str]:
    """Of a folder that `embed SHARDS -o FOLDER/` wrote, without the rows that have an error."""
    pq = pyarrow("parquet")
    files = sorted(path.glob("*.parquet"))
    models = {(pq.read_metadata(file).metadata or {}).get(b"model", b"") for file in files}
    if len(models) != 1:
        raise ValueError(f"parts of {len(models)} models" if models else "no parts")
    good = pyarrow("compute").field("error").is_null()
    table = pq.read_table(files, columns=["shard", "key", "embedding"], filters=good)
    names = table.select(["shard", "key"]).to_pylist()
    images = [f"{row['shard']}: {row['key']}" for row in names]
    if not len(table):
        raise ValueError("no embeddings, but errors")
    width = table.schema.field("embedding").type.list_size
    numbers = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    return images, numbers, models.pop().decode()


def pyarrow(module: str = "") -> Any:
    try:
        return import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ImportError as error:  # missing, or too new for this numpy
        raise ConfigurationError(
            f'.parquet needs pyarrow: pip install "vit-client[parquet]" ({error})'
        ) from None


class _Format(NamedTuple):
    write: Callable[[Path, Table], None]
    read: Callable[[Path], tuple[list[str], Array, str]]
    read_images: Callable[[Path], list[str]]


_FORMATS = {
    ".npz": _Format(_write_npz, _read_npz, _read_npz_images),
    ".safetensors": _Format(_write_safetensors, _read_safetensors, _read_safetensors_images),
    ".parquet": _Format(_write_parquet, _read_parquet, _read_parquet_images),
}
