"""`Client`. Generated from _async.py by tools/make_sync.py: change it there.

How it works is in _bridge.py: an AsyncClient on a thread of its own.
"""
# mypy: disable-error-code="overload-overlap, no-any-return"

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Generator, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from ._async import AsyncClient
from ._bridge import Bridge
from ._progress import Progress
from ._settings import ChannelOptions
from .types import (
    Analysis,
    AnswersT,
    Features,
    Health,
    ImageLike,
    Item,
    Model,
    OnError,
    Prediction,
    Task,
)


class Client:
    """A client that classifies, embeds and maps images on a Triton server.

    Use it in `with`, or call `close()`. One client is enough for a program: it may be
    shared by any number of threads, and a connection costs more than a request. It does not
    survive a fork: make it in the process that uses it.

    An image is a path, the bytes of an image file, an open binary file, a PIL image, or a uint8
    array (or tensor) [height, width, 3] in RGB order. One image gives one result. A list, an array
    or table column of paths, or any other iterable gives a result for each image, in order, and may
    have any length: it is split into requests of a size that the server accepts, sent several at
    once. For more images than fit in memory use `stream`.

    Every method that sends requests may raise any of `vit_client.errors`, and takes `timeout`: the
    seconds that one request may take, including reading its images, waiting for a slot, sending,
    the server's work, retries and the pauses between them. A long list takes several requests. An
    image that cannot be read in that time, from a pipe or a mount that hangs, is a `BadImage`; the
    other images are sent without it.

    All results of one call are from one model, even if it is replaced during the call (images
    processed by the old one are then sent again); `stream` gives the model of each result.

    Each request has an id: the `request_id` of the call, with "-2" and so on appended for further
    requests of a long list, or a generated one. It is sent to the server, and errors (`request_id`)
    and log lines have it. `logging.getLogger("vit_client")` logs retries at INFO and each attempt
    at DEBUG. With the extra "opentelemetry" and a tracer provider there is a span for each call.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        authority: str | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        concurrency: int | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        tls: bool | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        cert_file: str | os.PathLike[str] | None = None,
        key_file: str | os.PathLike[str] | None = None,
        channel_options: ChannelOptions | None = None,
    ) -> None:
        """Configure a client. It connects on first use.

        An argument that is not given is read from the environment variable in brackets; if that
        is not set either, the default applies.

        Args:
            url: Where the server listens for gRPC: "host:port", "grpcs://host:port" for TLS,
                or any gRPC name such as "dns:///vit.example:8001". Requests are distributed
                round-robin over all addresses that a name resolves to.
                [VIT_URL, default localhost:8001]
            authority: gRPC's :authority header, "host" or "host:port": the name of the server if
                `url` is a gateway shared by several, as in KServe. With TLS it is also the name
                that the certificate must have. [VIT_AUTHORITY, default the host in `url`]
            timeout: Seconds per request, retries included. [VIT_TIMEOUT, default 60]
            retries: Maximum retries of a request if the server is overloaded or unavailable; 0 for
                none. Retries for overload are limited, over all requests, to a tenth of the
                successes plus one per second, so that they cannot worsen it. Retries of requests
                that another client's malformed request in the same batch failed do not count, but
                are limited to the successes plus 40 per second; with 0 there are none. A request
                that no server started to process, because it was closing an old connection, is
                sent again in any case. [VIT_RETRIES, default 4]
            concurrency: Maximum requests in flight, over all calls of this client.
                [VIT_CONCURRENCY, default 16]
            token: Sent as "authorization: Bearer …". [VIT_TOKEN]
            headers: Sent as gRPC metadata with each request. [VIT_HEADERS, as "name: value, name:
                value", or one per line if a value has commas]
            tls: Whether to use TLS. [VIT_TLS, 0 or 1; default: if `url` is grpcs:// or one of the
                files below is given]
            ca_file: PEM file with the certificates to trust.
                [VIT_CA_FILE, default gRPC's built-in roots]
            cert_file: PEM file with the client's certificate, for mutual TLS. [VIT_CERT_FILE]
            key_file: PEM file with its private key. [VIT_KEY_FILE]
            channel_options: gRPC channel arguments; they override this client's own.

        Raises:
            ConfigurationError: A value is invalid; the message names it. Or gevent or eventlet
                has patched this process's threads, which gRPC's asyncio does not support.
        """
        self._bridge = Bridge(
            AsyncClient(
                url,
                authority=authority,
                timeout=timeout,
                retries=retries,
                concurrency=concurrency,
                token=token,
                headers=headers,
                tls=tls,
                ca_file=ca_file,
                cert_file=cert_file,
                key_file=key_file,
                channel_options=channel_options,
            )
        )

    @overload
    def classify(
        self,
        images: ImageLike,
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction]: ...

    @overload
    def classify(
        self,
        images: Iterable[ImageLike],
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[list[Prediction]]: ...

    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Classify: the most likely classes of each image, best first.

        Args:
            images: One image, or several.
            top_k: Number of classes; at most `model().max_top_k`, or 5 if that is less, which then
                returns all of them.
            timeout: Seconds per request; defaults to the client's timeout.
            request_id: The request's id, as sent to Triton; generated if not given.

        Returns:
            For one image a list of `top_k` predictions (label, index, score), for several images
            a list of such lists.

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; carries the results of the others.
            ValueError: `top_k` is less than 1, or more than it may be (see above).
        """
        return self._bridge.run(
            self._bridge.client.classify(
                images, top_k=top_k, timeout=timeout, request_id=request_id
            )
        )

    def probabilities(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """The probability of every class.

        Args:
            images: One image, or several.
            timeout: Seconds per request; defaults to the client's timeout.
            request_id: The request's id, as sent to Triton; generated if not given.

        Returns:
            For one image float32 [C], for N images float32 [N, C]; each row sums to 1.
            Class `Prediction.index` is at that position.

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; carries the results of the others.
        """
        return self._bridge.run(
            self._bridge.client.probabilities(images, timeout=timeout, request_id=request_id)
        )

    def embed(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embed: a vector for each image; similar images have similar vectors.

        The vectors are not normalised: compare them by cosine similarity.

        Args:
            images: One image, or several.
            timeout: Seconds per request; defaults to the client's timeout.
            request_id: The request's id, as sent to Triton; generated if not given.

        Returns:
            For one image float32 [D], for N images float32 [N, D].

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; carries the results of the others.
        """
        return self._bridge.run(
            self._bridge.client.embed(images, timeout=timeout, request_id=request_id)
        )

    def features(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Features:
        """Feature map: a vector for each patch of the image.

        Args:
            images: One image, or several.
            timeout: Seconds per request; defaults to the client's timeout.
            request_id: The request's id, as sent to Triton; generated if not given.

        Returns:
            {"neck": map}, for one image float32 [D, h, w], for N images float32 [N, D, h, w].
            [:, y, x] is the patch in row y from the top and column x from the left. The mean over
            all patches is what `embed` returns.

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; carries the results of the others.
        """
        return self._bridge.run(
            self._bridge.client.features(images, timeout=timeout, request_id=request_id)
        )

    @overload
    def analyze(
        self,
        images: ImageLike,
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Analysis: ...

    @overload
    def analyze(
        self,
        images: Iterable[ImageLike],
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[Analysis]: ...

    @overload
    def analyze(
        self,
        images: ImageLike,
        *,
        into: type[AnswersT],
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> AnswersT: ...

    @overload
    def analyze(
        self,
        images: Iterable[ImageLike],
        *,
        into: type[AnswersT],
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[AnswersT]: ...

    def analyze(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        into: type[Any] = Analysis,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Any:
        """Several results of a single forward pass.

            predictions, embedding = client.analyze("cat.jpg")

        For other results, pass a class with fields for them:

            class Card(NamedTuple):
                probabilities: npt.NDArray[np.float32]
                embedding: npt.NDArray[np.float32]

            card = client.analyze("cat.jpg", into=Card)  # a Card

        Args:
            images: One image, or several.
            into: A NamedTuple or dataclass with some of the fields `predictions`, `probabilities`,
                `embedding` and `neck`, each as its own method returns it for one image. Only these
                are requested. Default: Analysis, with `predictions` and `embedding`.
            top_k: Number of predictions; at most `model().max_top_k`, or 5 if that is less, which
                then returns all of them.
            timeout: Seconds per request; defaults to the client's timeout.
            request_id: The request's id, as sent to Triton; generated if not given.

        Returns:
            For one image an instance of `into`, for several images a list of them.

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; carries the results of the others.
            ModelNotServed: An older vit-builder, without `analyze`, built the server's models.
            ValueError: `into` has other fields, or `top_k` is less than 1, or more than it may be
                (see above).
        """
        return self._bridge.run(
            self._bridge.client.analyze(
                images, into=into, top_k=top_k, timeout=timeout, request_id=request_id
            )
        )

    @overload
    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        task: Literal["classify"],
        top_k: int = 5,
        on_error: OnError = "raise",
        progress: Progress = False,
        timeout: float | None = None,
        request_id: str | None = None,
        model_version: str | None = None,
    ) -> Generator[Item[list[Prediction]], None, None]: ...

    @overload
    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        task: Literal["probabilities", "embed"] = "embed",
        on_error: OnError = "raise",
        progress: Progress = False,
        timeout: float | None = None,
        request_id: str | None = None,
        model_version: str | None = None,
    ) -> Generator[Item[npt.NDArray[np.float32]], None, None]: ...

    @overload
    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        task: Literal["features"],
        on_error: OnError = "raise",
        progress: Progress = False,
        timeout: float | None = None,
        request_id: str | None = None,
        model_version: str | None = None,
    ) -> Generator[Item[Features], None, None]: ...

    @overload
    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        task: Literal["analyze"],
        top_k: int = 5,
        on_error: OnError = "raise",
        progress: Progress = False,
        timeout: float | None = None,
        request_id: str | None = None,
        model_version: str | None = None,
    ) -> Generator[Item[Analysis], None, None]: ...

    @overload
    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        task: Literal["analyze"],
        into: type[AnswersT],
        top_k: int = 5,
        on_error: OnError = "raise",
        progress: Progress = False,
        timeout: float | None = None,
        request_id: str | None = None,
        model_version: str | None = None,
    ) -> Generator[Item[AnswersT], None, None]: ...

    @overload
    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        task: Task = "embed",
        top_k: int = 5,
        on_error: OnError = "raise",
        progress: Progress = False,
        timeout: float | None = None,
        request_id: str | None = None,
        model_version: str | None = None,
    ) -> Generator[Item[Any], None, None]: ...

    def stream(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        task: Task = "embed",
        into: type[Any] | None = None,
        top_k: int = 5,
        on_error: OnError = "raise",
        progress: Progress = False,
        timeout: float | None = None,
        request_id: str | None = None,
        model_version: str | None = None,
    ) -> Generator[Item[Any], None, None]:
        """Process any number of images, in order, in bounded memory.

        Images are read ahead and sent while you work on earlier results. A plain iterable is read
        in a thread of its own, so it may block. Closing the iterator early (leaving the loop, or
        `close()`/`aclose()`) cancels the requests in flight. Wrap an `async for` that may be left
        early in `contextlib.aclosing`: otherwise Python closes it only on garbage collection.

        Args:
            images: Any iterable or async iterable of images.
            task: "classify", "probabilities", "embed", "features" or "analyze".
            into: The results of "analyze", as for that method.
            top_k: Number of classes, for "classify" and "analyze".
            on_error: What to do with an image that cannot be used: "raise" its BadImage when its
                turn comes, "return" it as an item with `error` set, or "skip" it. All other errors,
                such as a lost server, are always raised.
            progress: True for a progress bar on standard error (needs the extra "progress"), or
                a function that is called with the number of images done so far.
            timeout: Seconds per request; defaults to the client's timeout.
            request_id: The id of the first request, as sent to Triton; the others have a number
                appended ("-2", "-3", …). Generated if not given.
            model_version: Accept results of this model only (`Model.version`), for example to go on
                with stored ones. If the server has another, ModelChanged is raised.

        Yields:
            An Item for each image: `index`, `image`, and `result` as the method of the task
            would return it for this one image.
        """
        return self._bridge.stream(
            self._bridge.client._batches(
                images=images,
                task=task,
                into=into,
                top_k=top_k,
                on_error=on_error,
                progress=progress,
                timeout=timeout,
                request_id=request_id,
                model_version=model_version,
            ),
            on_error,
        )

    def model(self, *, timeout: float | None = None, model_version: str | None = None) -> Model:
        """The served model: name, sizes, classes, precision, whether it is trained.

        Args:
            timeout: Seconds; defaults to the client's timeout.
            model_version: The version to describe; by default the one that served this client's
                last request. Each is requested once and then cached.

        Raises:
            ModelChanged: The server does not have this version.
            ModelNotServed: A server responded, but it serves other models.
        """
        return self._bridge.run(
            self._bridge.client.model(timeout=timeout, model_version=model_version)
        )

    def health(self, *, timeout: float = 5.0) -> Health:
        """Check the server with a real image. Reports failures in its result instead of raising,
        and does not retry.

        Args:
            timeout: Seconds for the whole check.
        """
        return self._bridge.run(self._bridge.client.health(timeout=timeout))

    def close(self) -> None:
        """Cancel the requests in flight and close the connection. May be called more than once."""
        self._bridge.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
