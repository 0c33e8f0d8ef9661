"""Writes a Triton model repository from the template in `model_repository/`, atomically."""

import ctypes
import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from . import __version__, ensembles
from .checkpoint import Checkpoint

TEMPLATE = Path(__file__).parent / "model_repository"
REPORT = "build_report.json"
CONFIG = "config.pbtxt"
QUEUED_BATCHES = 8  # see preprocess/config.pbtxt
# Two streams: one copies while the other computes. Not measured yet.
GPU_INSTANCES = 2
IN_TEMPLATE = "1"  # name of the version folders


class RepositoryError(Exception):
    """The output folder cannot be written; the message says why."""


@dataclass(frozen=True)
class Settings:
    """Choices at build time that do not follow from the checkpoint."""

    precision: str
    max_batch_size: int
    top_k: int
    device: str = "cpu"  # the target; the network runs on both
    neck_precision: str = "fp32"  # on the wire
    fast_jpeg: bool = False
    max_image_pixels: int = 110_000_000
    max_request_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if self.precision == "int8" and self.device != "cpu":
            raise ValueError("int8 is for CPUs: on a GPU use fp16")


def fill(
    folder: Path,
    checkpoint: Checkpoint,
    traced: torch.jit.ScriptModule,
    settings: Settings,
    sha256: str,
    version: int,
) -> None:
    """Write the whole repository into `folder`, which is empty. All models get the same version."""
    # Includes .gitkeep: an ensemble's version folder is otherwise empty, and lost by git and zip.
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TEMPLATE, folder, ignore=ignore, dirs_exist_ok=True)
    whole = text_format.Parse((folder / ensembles.WHOLE / CONFIG).read_text(), ModelConfig())
    for name in ensembles.PARTS:
        shutil.copytree(folder / ensembles.WHOLE, folder / name)
        config = ensembles.part(whole, name)
        (folder / name / CONFIG).write_text(text_format.MessageToString(config))
    dims = _dims(checkpoint, settings)
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        config = text_format.Parse(path.read_text(), ModelConfig())
        config.max_batch_size = settings.max_batch_size
        for tensor in (*config.input, *config.output):
            tensor.dims[:] = dims.get(tensor.name, tensor.dims)
            if tensor.name in ("neck", "neck__2") and settings.neck_precision == "fp16":
                tensor.data_type = DataType.TYPE_FP16
        if config.name == "preprocess":
            config.parameters["fast_jpeg"].string_value = str(settings.fast_jpeg).lower()
            config.parameters["max_image_pixels"].string_value = str(settings.max_image_pixels)
            config.parameters["max_request_bytes"].string_value = str(settings.max_request_bytes)
            # A batch, or half of one: see its config.pbtxt.
            share = 1 if settings.device == "cuda" else 2
            waiting = -(-settings.max_batch_size // share)
            config.parameters["max_waiting_images"].string_value = str(waiting)
            queue = config.dynamic_batching.default_queue_policy
            queue.max_queue_size = QUEUED_BATCHES * settings.max_batch_size
        if config.name == "vit":
            _fill_vit(config, checkpoint, settings, sha256)
            # Also in the config: a client may get the model's metadata from another server.
            config.parameters["model_version"].string_value = str(version)
        for step in config.ensemble_scheduling.step:
            step.model_version = version
        (path.parent / IN_TEMPLATE).rename(path.parent / str(version))
        path.write_text(text_format.MessageToString(config))
    # Via memory: on a full disk torch's own writer aborts the process.
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    model, names = (folder / file for file in built(version))
    model.write_bytes(buffer.getbuffer())
    labels = "".join(" ".join(label.split("\n")) + "\n" for label in checkpoint.labels)
    names.write_text(labels, "utf-8", newline="\n")


def built(version: int) -> tuple[str, str]:
    """Return the files that must be from the same build: the network and its labels."""
    return f"vit/{version}/model.pt", f"postprocess/{version}/labels.txt"


def model_file(repository: Path) -> Path:
    """Return the path of the network in a repository that `fill` wrote."""
    (file,) = repository.glob("vit/*/model.pt")
    return file


def _fill_vit(config: ModelConfig, checkpoint: Checkpoint, settings: Settings, sha256: str) -> None:
    for warmup in config.model_warmup:
        warmup.batch_size = min(warmup.batch_size, settings.max_batch_size)
        warmup.inputs["pixels"].dims[:] = config.input[0].dims
    config.model_warmup[-1].batch_size = settings.max_batch_size
    if settings.device == "cuda":
        group = config.instance_group.add()
        group.kind, group.count = group.KIND_GPU, GPU_INSTANCES
    # Triton passes these through; clients read them with the ModelConfig call.
    config.parameters["builder_version"].string_value = __version__
    config.parameters["model_name"].string_value = checkpoint.name
    config.parameters["weights"].string_value = "trained" if checkpoint.trained else "random"
    config.parameters["weights_sha256"].string_value = sha256
    config.parameters["precision"].string_value = settings.precision
    config.parameters["max_request_bytes"].string_value = str(settings.max_request_bytes)


def _dims(checkpoint: Checkpoint, settings: Settings) -> dict[str, list[int]]:
    """Return the shape, without the batch axis, of each tensor that depends on the checkpoint."""
    cfg = checkpoint.config
    pixels, classes, k = [*cfg.image_size, 3], [cfg.num_classes], [settings.top_k]
    embedding, neck = [cfg.hidden_dim], [cfg.hidden_dim, *cfg.grid]
    return {
        "pixels": pixels,
        **dict.fromkeys(("probabilities", "probabilities__0"), classes),
        **dict.fromkeys(("embedding", "embedding__1"), embedding),
        **dict.fromkeys(("neck", "neck__2"), neck),
        **dict.fromkeys(("top_scores__3", "top_scores", "scores"), k),
        **dict.fromkeys(("top_indices__4", "top_indices", "indices", "labels"), k),
    }


def check_output(output: Path) -> None:
    """Raise RepositoryError if `output` can be neither created nor replaced."""
    if os.path.ismount(output):
        raise RepositoryError(
            f"{output} is a mount point, which cannot be replaced: choose a folder inside it"
        )
    if not output.exists() or (output / REPORT).is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise RepositoryError(
            f"{output} exists, but vit-builder did not write it: choose another --output, or "
            "remove it"
        )


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Provide an empty folder to build in; on success it becomes `output`, else it is removed.

    An existing repository is exchanged in one step, so that a partial one never exists.

    Raises:
        RepositoryError: `output` exists and is not a repository that this builder wrote, or it
            cannot be written.
    """
    check_output(output)
    output = output.resolve()
    building = output.with_name(f".{output.name}.building-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Remove what killed builders left.
        for left in output.parent.glob(f".{output.name}.building-*"):
            if left == building or not Path("/proc", left.name.rpartition("-")[2]).exists():
                shutil.rmtree(left)
        building.mkdir()
        yield building
        if output.exists():
            _exchange(building, output)
        else:
            building.rename(output)
    except OSError as e:
        first = e.args[0][0][2] if isinstance(e, shutil.Error) else e.strerror
        raise RepositoryError(f"{output} cannot be written: {first or e}") from e
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders of a file system in one step: renameat2(2) with RENAME_EXCHANGE."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, bytes(a), here, bytes(b), exchange) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise RepositoryError(
                f"{b} exists, and its file system (NFS, for example) cannot replace a folder "
                "in one step: choose another folder"
            )
        raise OSError(code, os.strerror(code))
