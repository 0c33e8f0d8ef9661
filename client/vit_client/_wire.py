"""Requests and responses of the ensembles in Triton's gRPC protocol."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import __version__
from . import _protocol as pb
from ._question import Question
from .errors import ModelNotServed
from .types import Model, Prediction

MODEL = "vit"

# The output tensors of each answer.
_OUTPUTS = {
    "predictions": ("scores", "indices", "labels"),
    "probabilities": ("probabilities",),
    "embedding": ("embedding",),
    "neck": ("neck",),
}

# For a server that does not report a limit.
_MAX_REQUEST_BYTES = 64 << 20

_DTYPES = {"FP32": "<f4", "FP16": "<f2", "INT32": "<i4"}

# One line for each bad image of a request. Triton puts "in ensemble '…', " before the first.
_BAD_ROW = re.compile(r"(?:^|\W)image\[(\d+)\]: *(.*)")


def request(question: Question, files: Sequence[bytes]) -> Any:
    """A ModelInferRequest with one encoded file per row."""
    message = pb.ModelInferRequest(
        model_name=question.ensemble,
        model_version=question.model_version,
        id=question.next_id(),
    )
    message.inputs.add(name="image", datatype="BYTES", shape=[len(files), 1])
    for answer in question.answers:
        for output in _OUTPUTS[answer]:
            message.outputs.add(name=output)
    parts = [part for file in files for part in (struct.pack("<I", len(file)), file)]
    message.raw_input_contents.append(b"".join(parts))
    return message


def queue_timeout(left: float) -> int:
    """Microseconds that a request with `left` seconds to its deadline may wait in the server's
    queue: half. A request that leaves the queue at its deadline would be processed in vain."""
    return max(1, int(left * 500_000))


def rows(question: Question, response: Any) -> list[dict[str, Any]]:
    """The answers of a ModelInferResponse for each row, by name. Arrays are read-only views of
    it."""
    raw = {
        output.name: (output, data)
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    try:
        columns = [_column(answer, raw, question.top_k) for answer in question.answers]
        return [dict(zip(question.answers, row, strict=True)) for row in zip(*columns, strict=True)]
    except (KeyError, ValueError, struct.error) as error:
        raise ModelNotServed(
            f"the server's {question.ensemble!r} has outputs that this client does not expect "
            f"({error!r})",
            task=question.task,
        ) from error


def _column(answer: str, raw: dict[str, tuple[Any, bytes]], top_k: int) -> list[Any]:
    """One answer for all rows."""
    if answer == "predictions":
        scores, indices = _array(*raw["scores"]), _array(*raw["indices"])
        return _predictions(scores, indices, raw["labels"][1], top_k)
    (output,) = _OUTPUTS[answer]
    return list(_array(*raw[output]).astype(np.float32, copy=False))  # neck may be fp16


def bad_rows(details: str) -> dict[int, str]:
    """Row and reason of each bad image that an INVALID_ARGUMENT status names."""
    matches = (_BAD_ROW.search(line) for line in details.splitlines())
    return {int(match[1]): match[2].strip() for match in matches if match}


def model(config: Any, version: str) -> Model:
    """The Model of a ModelConfig of `vit`; `version` is the default if the config has none.

    Raises:
        ModelNotServed: It is another model that happens to be called `vit`.
    """
    dims = {tensor.name: list(tensor.dims) for tensor in (*config.input, *config.output)}
    text = {name: value.string_value for name, value in config.parameters.items()}
    try:
        height, width, _ = dims["pixels"]
        depth, rows, columns = dims["neck__2"]
        return Model(
            name=text.get("model_name", ""),
            version=text.get("model_version", version),
            image_size=(height, width),
            classes=dims["probabilities__0"][0],
            embedding_size=dims["embedding__1"][0],
            feature_shape=(depth, rows, columns),
            max_top_k=dims["top_scores__3"][0],
            max_batch_size=max(1, config.max_batch_size),
            max_request_bytes=_request_bytes(text.get("max_request_bytes", "")),
            precision=text.get("precision", ""),
            trained=text.get("weights") != "random",
            weights_sha256=text.get("weights_sha256", ""),
            builder_version=text.get("builder_version", ""),
        )
    except (KeyError, ValueError, IndexError):
        raise ModelNotServed(
            f"the server has a model named {MODEL!r}, but not the one this client is made for: "
            f"its tensors are {sorted(dims)}"
        ) from None


def misfit(builder: str, client: str = __version__) -> str:
    """A warning if a model built by this version of vit-builder may be incompatible; else "".

    The two are compatible if their major versions are equal, before 1.0 also the minor ones.
    """
    theirs, ours = _compatible(builder), _compatible(client)
    if not theirs or theirs == ours:
        return ""
    newer = "update vit-client"
    older = f"rebuild the model, or install vit-client {'.'.join(map(str, theirs))}"
    return (
        f"the server's model was built by vit-builder {builder}, and this is vit-client {client}: "
        f"they may be incompatible ({newer if theirs > ours else older})"
    )


def _compatible(version: str) -> tuple[int, ...]:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers:
        return ()
    major, minor = map(int, numbers.groups())
    return (major,) if major else (major, minor)


def _request_bytes(text: str) -> int:
    # A protobuf message cannot exceed 2 GiB.
    return min(int(text), 2**31 - 1) if text.isdecimal() and int(text) else _MAX_REQUEST_BYTES


def _array(output: Any, data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, _DTYPES[output.datatype]).reshape(output.shape)


def _predictions(
    scores: npt.NDArray[Any], indices: npt.NDArray[Any], labels: bytes, top_k: int
) -> list[list[Prediction]]:
    rows = []
    start = 0
    length_at = struct.Struct("<I").unpack_from
    for row_scores, row_indices in zip(scores.tolist(), indices.tolist(), strict=True):
        row = []
        for rank, (index, score) in enumerate(zip(row_indices, row_scores, strict=True)):
            end = start + 4 + length_at(labels, start)[0]
            if rank < top_k:
                row.append(Prediction(labels[start + 4 : end].decode(), index, score))
            start = end
        rows.append(row)
    return rows
