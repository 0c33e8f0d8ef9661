"""Requests and answers of the four ensembles, as Triton's gRPC protocol has them."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as pb

from .errors import ModelNotServed
from .types import Model, Prediction

MODEL = "vit"

# Of a server that tells no bound.
_MAX_REQUEST_BYTES = 64 << 20

_DTYPES = {"FP32": "<f4", "FP16": "<f2", "INT32": "<i4"}

# One line for each bad image of a request. Triton puts "in ensemble '…', " before the first.
_BAD_ROW = re.compile(r"(?:^|\W)image\[(\d+)\]: *(.*)")


def request(task: str, files: Sequence[bytes]) -> pb.ModelInferRequest:
    """One request for `task` with one encoded file a row."""
    message = pb.ModelInferRequest(model_name=task)
    message.inputs.add(name="image", datatype="BYTES", shape=[len(files), 1])
    parts = [part for file in files for part in (struct.pack("<I", len(file)), file)]
    message.raw_input_contents.append(b"".join(parts))
    return message


def queue_timeout(left: float) -> int:
    """For how many microseconds a request may wait in the server's queue, of the seconds that are
    left to it: half. One that leaves the queue as its time ends is work for nobody."""
    return max(1, int(left * 500_000))


def answer(task: str, response: pb.ModelInferResponse, top_k: int) -> list[Any]:
    """The answer to each row. Arrays are read-only views into the response."""
    raw = {
        output.name: (output, data)
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    try:
        if task == "classify":
            scores, indices = _array(*raw["scores"]), _array(*raw["indices"])
            return _predictions(scores, indices, raw["labels"][1], top_k)
        if task == "probabilities":
            return list(_array(*raw["probabilities"]))
        if task == "embed":
            return list(_array(*raw["embedding"]))
        neck = _array(*raw["neck"]).astype(np.float32, copy=False)  # fp16 where it was built so
        return [{"neck": row} for row in neck]
    except (KeyError, ValueError, struct.error) as error:
        raise ModelNotServed(
            f"the server's {task!r} does not answer as this client expects ({error!r})", task=task
        ) from error


def stack(task: str, results: list[Any], model: Model) -> Any:
    """The answer to a list of images, from the answers to each."""
    if task == "classify":
        return results
    if task == "features":
        necks = [result["neck"] for result in results]
        return {"neck": _stack(necks, model.feature_shape)}
    width = model.embedding_size if task == "embed" else model.classes
    return _stack(results, (width,))


def own(task: str, result: Any) -> Any:
    """The answer to one image without the rest of its response, writable."""
    if task == "classify":
        return result
    if task == "features":
        return {name: array.copy() for name, array in result.items()}
    return result.copy()


def bad_rows(details: str) -> dict[int, str]:
    """Row and reason of each bad image that an INVALID_ARGUMENT answer names."""
    matches = (_BAD_ROW.search(line) for line in details.splitlines())
    return {int(match[1]): match[2].strip() for match in matches if match}


def model(config: Any, version: str) -> Model:
    """What a ModelConfig of `vit` tells. Raises ModelNotServed if that is not our model."""
    dims = {tensor.name: list(tensor.dims) for tensor in (*config.input, *config.output)}
    text = {name: value.string_value for name, value in config.parameters.items()}
    try:
        height, width, _ = dims["pixels"]
        depth, rows, columns = dims["neck__2"]
        return Model(
            name=text.get("model_name", ""),
            version=version,
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
        )
    except (KeyError, ValueError, IndexError):
        raise ModelNotServed(
            f"the server has a model named {MODEL!r}, but not the one this client is for: "
            f"its tensors are {sorted(dims)}"
        ) from None


def _request_bytes(text: str) -> int:
    # More than 2 GiB is no message of protobuf's.
    return min(int(text), 2**31 - 1) if text.isdecimal() and int(text) else _MAX_REQUEST_BYTES


def answer_bytes(task: str, model: Model) -> int:
    """About how many bytes the answer to one image has."""
    if task == "classify":
        return 64 * model.max_top_k
    if task == "probabilities":
        return 4 * model.classes
    if task == "embed":
        return 4 * model.embedding_size
    depth, rows, columns = model.feature_shape
    return 4 * depth * rows * columns


def _array(output: Any, data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, _DTYPES[output.datatype]).reshape(output.shape)


def _stack(arrays: list[npt.NDArray[np.float32]], row: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.stack(arrays) if arrays else np.empty((0, *row), np.float32)


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
