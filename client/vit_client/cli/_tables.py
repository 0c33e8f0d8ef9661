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
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError, shortened
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
        ConfigurationError: Unknown format, its package is not installed, no such folder, or a
            folder is in the way.
        CannotWrite: The folder is not writable.
    """
    if path.suffix not in _FORMATS:
        raise ConfigurationError(f"{shortened(path)}: the name must end in {', '.join(_FORMATS)}")
    if path.suffix == ".parquet":
        _pyarrow("parquet")
    check_place(path)


def check_place(path: Path) -> None:
    """Raise where no file of the name `path` can be made, as `check` does."""
    # Path's own methods raise for a name that is too long.
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise ConfigurationError(f"{shortened(path)}: no such folder {shortened(path.parent)}")
    if os.path.isdir(path):  # noqa: PTH112
        raise ConfigurationError(f"{shortened(path)} is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CannotWrite(f"{shortened(path)} cannot be written (permission denied)")
    try:
        _beside(path).lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # the name is too long
        raise ConfigurationError(f"{shortened(path)}: {reason(error)}") from None


def write(path: Path, table: Table) -> None:
    """Write `table` in the format that the suffix names."""
    with replacing(path) as temporary:
        _FORMATS[path.suffix].write(temporary, table)


def read(path: Path) -> tuple[list[str], Array, str]:
    """Images, embeddings float32 [N, D] and model of a file that `write` wrote.

    Raises:
        ConfigurationError: No such file, or it is another kind of file.
    """
    with _errors_told(path):
        images, embeddings, model = _FORMATS[path.suffix].read(path)
        if embeddings.ndim != 2 or len(images) != len(embeddings):
            raise ValueError(f"{len(images)} names for {list(embeddings.shape)} numbers")
        return images, embeddings.astype(np.float32, copy=False), model


def read_images(path: Path) -> list[str]:
    """The images alone, in little time and memory; raises as `read` does."""
    with _errors_told(path):
        return _FORMATS[path.suffix].read_images(path)


@contextlib.contextmanager
def _errors_told(path: Path) -> Iterator[None]:
    if path.suffix not in _FORMATS:
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when all went well, and else vanishes.

    Raises:
        CannotWrite: Any OSError, told of `path`.
    """
    temporary = _beside(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise CannotWrite(f"{shortened(path)} cannot be written ({reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


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


def _read_npz_images(path: Path) -> list[str]:
    with np.load(path, allow_pickle=False) as arrays:
        images: list[str] = arrays["images"].tolist()
    return images


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


def _read_parquet_images(path: Path) -> list[str]:
    table = _pyarrow("parquet").read_table(path, columns=["image"])
    images: list[str] = table["image"].to_pylist()
    return images


def _pyarrow(module: str = "") -> Any:
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
