"""Files of embeddings: .npz, .safetensors and .parquet. None of them is ever seen half written."""

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
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError
from ._common import CannotWrite, reason

Array = npt.NDArray[np.float32]

# Whatever does not fit in memory twice is written a block at a time.
BLOCK = 4096

_FORMAT: Any = np.lib.format  # some versions of numpy have no types for it


@dataclass(frozen=True)
class Table:
    """Embeddings to be written."""

    images: Sequence[str]
    """Names, one a row."""
    width: int
    """Numbers in a row."""
    blocks: Callable[[], Iterable[Array]]
    """All rows, some [n, width] at a time."""
    model: str
    """The model that they are of, as JSON."""


def check(path: Path) -> None:
    """Say now, rather than after an hour's work, that `path` cannot be written.

    Raises:
        ConfigurationError: Unknown format, its package is not installed, or no such folder.
    """
    if path.suffix not in _WRITERS:
        raise ConfigurationError(f"{path}: the name must end in {', '.join(_WRITERS)}")
    if path.suffix == ".parquet":
        _pyarrow("parquet")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raise ConfigurationError where the folder that `path` is to be written to is not there."""
    if not path.parent.is_dir():
        raise ConfigurationError(f"{path}: no such folder {path.parent}")


def write(path: Path, table: Table) -> None:
    """Write `table` in the format that the suffix names."""
    with replacing(path) as temporary:
        _WRITERS[path.suffix](temporary, table)


def read(path: Path) -> tuple[list[str], Array, str]:
    """Images, embeddings float32 [N, D] and model of a file that `write` wrote.

    Raises:
        ConfigurationError: No such file, or it is another kind of file.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ConfigurationError(f"{path}: the name must end in {', '.join(_READERS)}")
    try:
        images, embeddings, model = reader(path)
    except ConfigurationError:  # no pyarrow
        raise
    except OSError as error:
        raise ConfigurationError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (KeyError, ValueError, zipfile.BadZipFile, struct.error) as error:
        raise ConfigurationError(f"{path} is not a file of embeddings ({error})") from None
    return images, embeddings, model


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when all went well, and else vanishes.

    Raises:
        CannotWrite: Any OSError, told of `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written ({reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    name: str,
    shape: Sequence[int],
    blocks: Iterable[Array],
    metadata: dict[str, str],
) -> None:
    """One float32 tensor. The format is a header of JSON and the numbers."""
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
    write_safetensors(path, "embeddings", shape, table.blocks(), metadata)


def _read_safetensors(path: Path) -> tuple[list[str], Array, str]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
        shape = header["embeddings"]["shape"]
        numbers = np.fromfile(file, "<f4", int(np.prod(shape)))
    metadata = header["__metadata__"]
    return json.loads(metadata["images"]), numbers.reshape(shape), metadata.get("model", "")


def _write_npz(path: Path, table: Table) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as file:
            head = {"descr": "<f4", "fortran_order": False}
            shape = (len(table.images), table.width)
            _FORMAT.write_array_header_1_0(file, {**head, "shape": shape})
            for block in table.blocks():
                file.write(np.ascontiguousarray(block, "<f4").tobytes())
        add_array(archive, "images.npy", np.array(table.images, dtype=np.str_))
        add_array(archive, "model.npy", np.array(table.model))


def add_array(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    """Write one member of a .npz file. `np.savez` leaves its archive open on a full disk."""
    file: IO[bytes]
    with archive.open(name, "w", force_zip64=True) as file:
        _FORMAT.write_array(file, array, allow_pickle=False)


def _read_npz(path: Path) -> tuple[list[str], Array, str]:
    with np.load(path, allow_pickle=False) as arrays:
        model = str(arrays["model"]) if "model" in arrays else ""
        return arrays["images"].tolist(), arrays["embeddings"], model


def _write_parquet(path: Path, table: Table) -> None:
    pa, pq = _pyarrow(), _pyarrow("parquet")
    fields = [("image", pa.string()), ("embedding", pa.list_(pa.float32(), table.width))]
    schema = pa.schema(fields, metadata={"model": table.model})
    start = 0
    with pq.ParquetWriter(path, schema) as writer:
        for block in table.blocks():
            names = pa.array(table.images[start : start + len(block)], pa.string())
            rows = pa.FixedSizeListArray.from_arrays(block.ravel(), table.width)
            writer.write_batch(pa.record_batch([names, rows], schema=schema))
            start += len(block)


def _read_parquet(path: Path) -> tuple[list[str], Array, str]:
    table = _pyarrow("parquet").read_table(path)
    column = table["embedding"].combine_chunks()
    model = (table.schema.metadata or {}).get(b"model", b"").decode()
    numbers = column.flatten().to_numpy().reshape(len(table), -1)
    return table["image"].to_pylist(), numbers, model


def _pyarrow(module: str = "") -> Any:
    try:
        return import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ImportError as error:  # missing, or too new for this numpy
        raise ConfigurationError(
            f'.parquet needs pyarrow: pip install "vit-client[parquet]" ({error})'
        ) from None


_WRITERS: dict[str, Callable[[Path, Table], None]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
}
_READERS: dict[str, Callable[[Path], tuple[list[str], Array, str]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}
