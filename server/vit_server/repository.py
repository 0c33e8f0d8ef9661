"""The model repository on disk: checks that it is complete, and copies it for tritonserver."""

import compileall
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from . import memory, sizing
from .http_front import MAX_REQUEST_BYTES
from .installation import reason
from .probe import ENSEMBLES
from .tritonserver import ServerError

MODELS = ("preprocess", "vit", "postprocess", *ENSEMBLES)
REPORT = "build_report.json"
AUTO = "auto"  # number of threads, in preprocess/config.pbtxt


def check(repository: Path) -> None:
    """Raise ServerError unless `repository` has all our models and the builder's files."""
    while True:
        try:
            before = repository.stat().st_ino if repository.exists() else 0
            _check(repository)
        except PermissionError as e:
            raise ServerError(
                f"{e.filename} cannot be read: {e.strerror} (uid {os.getuid()})"
            ) from e
        except ServerError:
            if not before or repository.stat().st_ino == before:
                raise
        else:
            return  # on an error, it may just have been replaced by another build: check again


def _check(repository: Path) -> None:
    if not repository.is_dir():
        raise ServerError(f"no such model repository: {repository} (create it with vit-builder)")
    missing = [] if (repository / REPORT).is_file() else [REPORT]
    built = [REPORT]
    if not missing:
        version = _report(repository, repository)["model_version"]
        built += _built(version)
        wanted = (*built, *(f"{model}/config.pbtxt" for model in MODELS))
        missing += [name for name in wanted if not (repository / name).is_file()]
        # An ensemble's version folder is empty, and is lost if a tool drops empty folders.
        folders = (f"{model}/{version}" for model in MODELS)
        missing += [name for name in folders if not (repository / name).is_dir()]
    if missing:
        hint = (
            "run vit-builder to create it"
            if missing[0] in built
            else "build it again with vit-builder"
        )
        what = f"no {missing[0]}; {hint}"
        raise ServerError(f"{repository} is not a complete model repository: {what}")


def snapshot(repository: Path, to: Path) -> None:
    """Copy the repository, so that later changes to it do not affect the running server.

    vit-builder may replace it at any moment, and a mix of an old and a new one would return wrong
    labels.

    Raises:
        ServerError: it cannot be copied, or weights and labels are not from one build.
    """
    while not _copied_in_one_piece(repository, to):
        shutil.rmtree(to)
    _check_digests(repository, to)
    # Python would write these files when the models start, and Triton would see an update.
    compileall.compile_dir(to, quiet=2)


@contextmanager
def told_as(repository: Path, copy: Path) -> Iterator[None]:
    """Make errors name the files in `repository`, which the user knows, instead of its copy's."""
    try:
        yield
    except ServerError as e:
        e.args = (str(e).replace(f"{copy}/", f"{repository}/"),)
        raise


def max_request_bytes(repository: Path) -> int:
    """Return the limit set by the builder, or the default if an older builder set none."""
    config = _config(repository, "preprocess")
    return _number(repository, config, "max_request_bytes") or MAX_REQUEST_BYTES


def fit(repository: Path, cores: int) -> None:
    """Set the processes and threads of `preprocess` and `postprocess` to suit the cores.

    Manual settings are kept: a changed number of processes, or, with a number of threads, both.
    """
    config = _config(repository, "preprocess")
    if config.parameters["threads"].string_value != AUTO:  # or unset, by an older builder
        return
    if [group.count for group in config.instance_group] == [sizing.LEAST]:
        pixels = max(1, _number(repository, config, "max_image_pixels"))
        shm = shutil.disk_usage("/dev/shm").free
        config.instance_group[0].count = sizing.processes(cores, pixels, memory.limit(), shm)
    threads = sizing.threads(cores, _processes(config))
    config.parameters["threads"].string_value = str(threads)
    _write(repository, "preprocess", config)
    naming = _config(repository, "postprocess")
    if [group.count for group in naming.instance_group] == [1]:
        naming.instance_group[0].count = sizing.naming(_processes(config))
        _write(repository, "postprocess", naming)


def for_gpu(repository: Path) -> bool:
    """Return whether the network must run on a GPU."""
    groups = _config(repository, "vit").instance_group
    return any(group.kind == group.KIND_GPU for group in groups)


def processes(repository: Path, model: str) -> int:
    """Return the minimum number of a Python model's processes: several GPUs may add more."""
    return _processes(_config(repository, model))


def without_warm_up(repository: Path) -> int:
    """Disable the network's warm-up; return its maximum batch size."""
    config = _config(repository, "vit")
    config.ClearField("model_warmup")
    _write(repository, "vit", config)
    return int(config.max_batch_size)


def _processes(config: ModelConfig) -> int:
    return max(1, sum(int(group.count) for group in config.instance_group))


def _number(repository: Path, config: ModelConfig, parameter: str) -> int:
    """Return a parameter of preprocess; 0 if it is not set. Raises ServerError."""
    try:
        return int(config.parameters[parameter].string_value or 0)
    except ValueError as e:
        raise ServerError(f"{repository}/preprocess/config.pbtxt: {parameter}: {e}") from e


def _config(repository: Path, model: str) -> ModelConfig:
    path = repository / model / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except (text_format.ParseError, ValueError) as e:
        raise ServerError(f"{path}: {e}") from e


def _write(repository: Path, model: str, config: ModelConfig) -> None:
    path = repository / model / "config.pbtxt"
    try:
        path.chmod(0o600)  # the original may be read-only
        path.write_text(text_format.MessageToString(config))
    except OSError as e:
        raise ServerError(f"{repository.parent} cannot be written: {e.strerror}") from e


def _copied_in_one_piece(repository: Path, to: Path) -> bool:
    """Copy the repository; return False if it was replaced in the meantime."""
    ignore = shutil.ignore_patterns("__pycache__")
    try:
        before = repository.stat().st_ino
        try:
            shutil.copytree(repository, to, ignore=ignore)
        except OSError:  # perhaps a file of an old repository that was replaced
            if repository.stat().st_ino == before:
                raise
        return repository.stat().st_ino == before
    except OSError as e:
        file = e.args[0][0][0] if isinstance(e, shutil.Error) else repository
        raise ServerError(f"{file} cannot be copied to {to.parent}: {reason(e)}") from e


def _built(version: int) -> tuple[str, str]:
    """Return the files that must be from the same build; the report has their digests."""
    return f"vit/{version}/model.pt", f"postprocess/{version}/labels.txt"


def _report(repository: Path, copy: Path) -> Any:
    """Return vit-builder's report on `repository`, read from the copy. Raises ServerError."""
    try:
        report = json.loads((copy / REPORT).read_text("utf-8"))
        complete = set(report["sha256"]) >= set(_built(report["model_version"]))
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ServerError(
            f"{repository}/{REPORT} is damaged or incomplete: build it again with vit-builder"
        )
    return report


def _check_digests(repository: Path, copy: Path) -> None:
    for name, digest in _report(repository, copy)["sha256"].items():
        if _sha256(copy / name) != digest:
            raise ServerError(
                f"{repository}/{name} is not the file that vit-builder wrote: it is "
                "damaged, or from another build"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
