"""The types of arguments and results."""

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

Beyond what the type says, a uint8 tensor of the same shape is accepted as an array, and a uint8
vector (OpenCV's `imencode`) as an encoded file. An open file that is at its end is read from its
beginning. URLs are not fetched."""

Task = Literal["classify", "probabilities", "embed", "features", "analyze"]

OnError = Literal["raise", "return", "skip"]

Features = dict[str, "npt.NDArray[np.float32]"]
"""Feature maps by name. The model has one, "neck": float32 [D, h, w], row by row from the
top left, with a vector of D numbers for each patch of the image."""


@dataclass(frozen=True)
class Prediction:
    """One predicted class of an image."""

    label: str
    """Name of the class, as in the checkpoint, e.g. "n02123045 tabby, tabby cat"."""
    index: int
    """Number of the class, from 0: its position in what `probabilities` returns."""
    score: float
    """Probability, 0 to 1. The scores of all classes sum to 1."""


class Analysis(NamedTuple):
    """The result of `analyze` for one image, unless `into` is given."""

    predictions: list[Prediction]
    """As `classify` returns them."""
    embedding: npt.NDArray[np.float32]
    """float32 [D], as `embed` returns it."""


AnswersT = TypeVar("AnswersT")
ResultT = TypeVar("ResultT", covariant=True)


@dataclass(frozen=True)
class Item(Generic[ResultT]):
    """What `stream` yields: one image with its result or its error."""

    index: int
    """Position of the image in the input, from 0."""
    image: Any
    """The image, as passed in."""
    _result: ResultT | None = field(repr=False)
    error: BadImage | None = None
    """Why there is no result. Set only with on_error="return"."""
    model_version: str = ""
    """The model that produced the result, as in `Model.version`; "" if there is an error. Results
    of different models must not be compared: a server may be replaced during a stream."""
    _sent: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def result(self) -> ResultT:
        """The result of the task for this image; raises `error` if there is one."""
        if self.error is not None:
            raise self.error
        return cast("ResultT", self._result)


@dataclass(frozen=True)
class Model:
    """The served model."""

    name: str
    """E.g. "vit_reg4_m16_rms_avg_i-jepa-imagenet21k"."""
    version: str
    """A number that vit-builder derives from all that determines the results: weights, labels,
    precisions, preprocessing, K. It is the `model_version` in each of Triton's responses, to any
    client. "" if the server does not report it."""
    image_size: tuple[int, int]
    """Height and width, in pixels, to which the server scales every image."""
    classes: int
    """C, the length of what `probabilities` returns."""
    embedding_size: int
    """D, the length of what `embed` returns."""
    feature_shape: tuple[int, int, int]
    """[D, h, w] of `features(image)["neck"]`."""
    max_top_k: int
    """K, the largest `top_k` of `classify` and `analyze`."""
    max_batch_size: int
    """Images that the server accepts in one request. The client splits longer lists."""
    max_request_bytes: int
    """Bytes that the server accepts in one request, and so in one image file; 64 MiB if it does not
    report it. Larger files are not read; PIL images and arrays are scaled before they are sent."""
    precision: str
    """"fp32", "bf16", "fp16" or "int8"; "" if the server does not report it."""
    trained: bool
    """False for a model with random weights, whose predictions are meaningless."""
    weights_sha256: str
    """SHA-256 of the checkpoint that it was built from, as hex digits; "" if there is none."""
    builder_version: str
    """The version of vit-builder that built it, e.g. "0.1.0"; "" if not reported."""


@dataclass(frozen=True)
class Health:
    """The result of a health check, for probes; as a bool it is `answering`."""

    live: bool
    """A server responds at the address."""
    ready: bool
    """It reports that all its models are loaded."""
    answering: bool
    """It has just processed a real image. This is the one to rely on: a server can be `ready` while
    every request fails."""
    latency: float | None
    """Seconds that this image took; None if it failed."""
    server: str
    """Name and version of the server, e.g. "triton 2.51.0"; "" if unknown."""
    problem: str
    """What is wrong, as text; "" if nothing is."""

    def __bool__(self) -> bool:
        return self.answering
