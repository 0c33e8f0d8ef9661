"""What goes in and what comes out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Literal, NamedTuple, TypeVar, Union, cast

import numpy as np
import numpy.typing as npt

from .errors import BadImage

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Analysis",
    "Features",
    "Health",
    "ImageLike",
    "Item",
    "Model",
    "OnError",
    "Prediction",
    "Task",
]

ImageLike = Union[
    str,
    "os.PathLike[str]",
    bytes,
    bytearray,
    memoryview,
    BinaryIO,
    "Image.Image",
    "npt.NDArray[np.uint8]",
]
"""One image: a path, an encoded file as bytes or as an open binary file, a PIL image, or a
uint8 array [height, width, 3] in RGB order.

Type checkers are told no more, but a uint8 tensor of the same shape is as good as an array; a
uint8 vector (OpenCV's `imencode`) is an encoded file; and an open file that stands at its end is
read from its beginning. URLs are not fetched."""

Task = Literal["classify", "probabilities", "embed", "features", "analyze"]

OnError = Literal["raise", "return", "skip"]

Features = dict[str, "npt.NDArray[np.float32]"]
"""Feature maps by name. The model has one, "neck": float32 [D, h, w], row by row from the
top left, one column of D numbers for each patch of the image."""


@dataclass(frozen=True)
class Prediction:
    """One guess."""

    label: str
    """Name of the class, as in the checkpoint, e.g. "n02123045 tabby, tabby cat"."""
    index: int
    """Number of the class, from 0: its place in what `probabilities` returns."""
    score: float
    """Probability, 0 to 1. Over all classes they sum to 1."""


class Analysis(NamedTuple):
    """What `analyze` answers about one image, unless it is asked for other answers."""

    predictions: list[Prediction]
    """As `classify` returns them."""
    embedding: npt.NDArray[np.float32]
    """float32 [D], as `embed` returns it."""


AnswersT = TypeVar("AnswersT")
ResultT = TypeVar("ResultT", covariant=True)


@dataclass(frozen=True)
class Item(Generic[ResultT]):
    """What `stream` yields: one image with its answer or its error."""

    index: int
    """Position of the image in the input, from 0."""
    image: Any
    """The image itself, as it was given."""
    _result: ResultT | None = field(repr=False)
    error: BadImage | None = None
    """Why there is no result. Only ever set with on_error="return"."""
    model_version: str = ""
    """Which model the result is from, as in `Model.version`; "" where there is an error. Results
    of different models must not be compared: a server may be replaced during a stream."""
    _sent: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def result(self) -> ResultT:
        """What the task answers for this one image; raises `error` if there is one."""
        if self.error is not None:
            raise self.error
        return cast("ResultT", self._result)


@dataclass(frozen=True)
class Model:
    """What the server serves."""

    name: str
    """E.g. "vit_reg4_m16_rms_avg_i-jepa-imagenet21k"."""
    version: str
    """A number that vit-builder makes of all that decides the answers: weights, labels,
    precisions, preprocessing, K. Triton's `model_version` in each answer, to any client, is the
    same. "" if the server does not tell."""
    image_size: tuple[int, int]
    """Height and width in pixels to which the server scales every image."""
    classes: int
    """C, the length of what `probabilities` returns."""
    embedding_size: int
    """D, the length of what `embed` returns."""
    feature_shape: tuple[int, int, int]
    """[D, h, w] of `features(image)["neck"]`."""
    max_top_k: int
    """K, the largest top_k that `classify` can answer."""
    max_batch_size: int
    """Images that the server accepts in one request. Longer lists are split for you."""
    max_request_bytes: int
    """Bytes that the server accepts in one request, and so in one image file: 64 MiB if it does not
    tell. Larger files are not read; PIL images and arrays are scaled before they are sent."""
    precision: str
    """"fp32", "bf16", "fp16" or "int8"; "" if the server does not tell."""
    trained: bool
    """False for a model with random weights, whose labels mean nothing."""
    weights_sha256: str
    """SHA-256 of the checkpoint it was built from, as hex digits; "" if there is none."""
    builder_version: str
    """Of the vit-builder that built it, e.g. "0.1.0"; "" if the server does not tell."""


@dataclass(frozen=True)
class Health:
    """Is there a server, and does it answer? False instead of an error, for probes."""

    live: bool
    """A server answers at the address."""
    ready: bool
    """It says that all its models are loaded."""
    answering: bool
    """It has just answered a real image. The one that counts: a server can be `ready` while
    every request fails."""
    latency: float | None
    """Seconds that this image took, or None."""
    server: str
    """Name and version of the server, e.g. "triton 2.51.0"; "" if unknown."""
    problem: str
    """What is wrong, in words; "" if nothing is."""

    def __bool__(self) -> bool:
        return self.answering
