"""`AsyncClient`, the source of both clients: `_sync.py` is generated from this file."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, get_args, overload

import numpy as np
import numpy.typing as npt

from . import _health, _one_model
from ._engine import Engine
from ._images import is_one_image, mistaken
from ._progress import Meter, Progress
from ._question import Question, check_version, question
from ._settings import ChannelOptions, Settings, check_timeout
from ._telemetry import annotate
from .errors import BadImages
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


class AsyncClient:
    """Asks a Triton server what is in images.

    Use it in `async with`, or call `close()`. One client is enough for a program: it may be
    shared by any number of tasks, and a connection costs more than a request. It belongs to the
    event loop it is first used in.

    Wherever a method takes an image, that is a path, the bytes of an image file, an open binary
    file, a PIL image, or a uint8 array (or tensor) [height, width, 3] in RGB order. One image gives
    one result; a list, an array or table column of paths, or any other iterable gives the results
    of all, in order, and may be of any length: it is sent in requests of a size that the server
    accepts, several at once. For more than fits in memory there is `stream`.

    Every method that asks the server may raise any of `vit_client.errors`, and takes `timeout`:
    the seconds that one request may take, with everything that belongs to it: reading its images,
    waiting for its turn, sending, the server's work, retries and the pauses between them. A long
    list takes several requests. An image that cannot be read in that time, from a pipe or a mount
    that hangs, is a `BadImage`, and holds up no others: they are sent without it.

    The results of one call are all of one model, also where another takes its place meanwhile (what
    is of the old one is asked again); `stream` tells the model of each.

    Each request has an id, a made one or the `request_id` of the call (the second request of a long
    list has "-2" after it, and so on). The server gets it; errors (`request_id`) and log lines have
    it. `logging.getLogger("vit_client")` tells of retries at INFO and of each try at DEBUG. With
    the extra "opentelemetry" and a tracer provider there is a span for each call.
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
        """Set up a client. It connects when it is first used.

        What is not given is taken from the environment variable in brackets, then from the
        default.

        Args:
            url: Where the server listens for gRPC: "host:port", "grpcs://host:port" for TLS,
                or any gRPC name such as "dns:///vit.example:8001". The requests go in turn to
                all addresses that a name resolves to. [VIT_URL, default localhost:8001]
            authority: The name of the server that is meant, "host" or "host:port", where the
                address is that of a gateway for many, as in KServe: gRPC's :authority header.
                With TLS it is also the name that the certificate must have, instead of the
                address's. [VIT_AUTHORITY, default the address's own name]
            timeout: Seconds for each request, retries included. [VIT_TIMEOUT, default 60]
            retries: How often a request is tried again when the server is overloaded or
                unavailable. Those for overload are limited, over all requests, to a tenth of
                the successes plus one a second, so that they cannot add to it. Not counted, but
                limited to the successes plus 40 a second, are those of requests that failed
                for a malformed one of somebody else in the same batch. With 0 the first
                answer counts; a request that a server gave back unbegun, as it ended an
                old connection, is sent again in any case. [VIT_RETRIES, default 4]
            concurrency: Requests in flight at once, over all calls of this client.
                [VIT_CONCURRENCY, default 16]
            token: Sent as "authorization: Bearer …". [VIT_TOKEN]
            headers: Sent as gRPC metadata with each request. [VIT_HEADERS, as "name: value, name:
                value", or one a line, where a value may have commas]
            tls: Whether to use TLS. [VIT_TLS, 0 or 1; default: if the address or a file below
                asks for it]
            ca_file: PEM file with the certificates to trust. [VIT_CA_FILE, default gRPC's own]
            cert_file: PEM file with the client's certificate, for mutual TLS. [VIT_CERT_FILE]
            key_file: PEM file with its private key. [VIT_KEY_FILE]
            channel_options: gRPC channel arguments, on top of this client's own.

        Raises:
            ConfigurationError: A value makes no sense; the message names it. Or gevent or
                eventlet has patched this process's threads, which gRPC's asyncio cannot bear.
        """
        self._engine = Engine(
            Settings.resolve(
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
    async def classify(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self,
        images: ImageLike,
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction]: ...
    @overload
    async def classify(
        self,
        images: Iterable[ImageLike],
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[list[Prediction]]: ...
    async def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """What is it? The most likely classes, best first.

        Args:
            images: One image, or several.
            top_k: How many classes; at most `model().max_top_k`.
            timeout: Seconds for each request; the client's own if not given.
            request_id: Triton's id for the request; a made one if not given.

        Returns:
            For one image a list of `top_k` predictions (label, index, score), for several a list
            of such lists.

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; has the answers of the others.
            ValueError: The model has no `top_k` classes to offer.
        """
        result: list[Any] = await self._ask(
            question("classify", top_k, request_id=request_id), images, timeout
        )
        return result

    async def probabilities(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """The probability of every class.

        Args:
            images: One image, or several.
            timeout: Seconds for each request; the client's own if not given.
            request_id: Triton's id for the request; a made one if not given.

        Returns:
            For one image float32 [C], for N images float32 [N, C]; each row sums to 1. A class's
            place is `Prediction.index`.

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; has the answers of the others.
        """
        result: npt.NDArray[np.float32] = await self._ask(
            question("probabilities", request_id=request_id), images, timeout
        )
        return result

    async def embed(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """What is it like? A vector for each image; similar images have similar vectors.

        Compare them by cosine: they are not normalised.

        Args:
            images: One image, or several.
            timeout: Seconds for each request; the client's own if not given.
            request_id: Triton's id for the request; a made one if not given.

        Returns:
            For one image float32 [D], for N images float32 [N, D].

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; has the answers of the others.
        """
        result: npt.NDArray[np.float32] = await self._ask(
            question("embed", request_id=request_id), images, timeout
        )
        return result

    async def features(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Features:
        """Where is what? A vector for each patch of the image.

        Args:
            images: One image, or several.
            timeout: Seconds for each request; the client's own if not given.
            request_id: Triton's id for the request; a made one if not given.

        Returns:
            {"neck": map}, for one image float32 [D, h, w], for N images float32 [N, D, h, w].
            [:, y, x] is the patch in row y from the top and column x from the left. The mean over
            all patches is what `embed` returns.

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; has the answers of the others.
        """
        result: Features = await self._ask(
            question("features", request_id=request_id), images, timeout
        )
        return result

    @overload
    async def analyze(  # type: ignore[overload-overlap]
        self,
        images: ImageLike,
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Analysis: ...
    @overload
    async def analyze(
        self,
        images: Iterable[ImageLike],
        *,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[Analysis]: ...
    @overload
    async def analyze(  # type: ignore[overload-overlap]
        self,
        images: ImageLike,
        *,
        into: type[AnswersT],
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> AnswersT: ...
    @overload
    async def analyze(
        self,
        images: Iterable[ImageLike],
        *,
        into: type[AnswersT],
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[AnswersT]: ...
    async def analyze(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        into: type[Any] = Analysis,
        top_k: int = 5,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Any:
        """Several of these questions at once, for the price of one: a single forward pass.

            predictions, embedding = client.analyze("cat.jpg")

        Other answers are asked for by a class that has fields for them:

            class Card(NamedTuple):
                probabilities: npt.NDArray[np.float32]
                embedding: npt.NDArray[np.float32]

            card = client.analyze("cat.jpg", into=Card)  # a Card

        Args:
            images: One image, or several.
            into: A NamedTuple or dataclass with some of the fields `predictions`, `probabilities`,
                `embedding` and `neck`, each as its own method returns it for one image. Only these
                are asked for. By default Analysis: `predictions` and `embedding`.
            top_k: How many predictions; at most `model().max_top_k`.
            timeout: Seconds for each request; the client's own if not given.
            request_id: Triton's id for the request; a made one if not given.

        Returns:
            For one image an `into`, for several a list of them.

        Raises:
            BadImage: The image cannot be used.
            BadImages: Some of several images cannot be used; has the answers of the others.
            ModelNotServed: The server's models are of an older vit-builder, without `analyze`.
            ValueError: `into` has other fields, or the model has no `top_k` classes to offer.
        """
        return await self._ask(
            question("analyze", top_k, into, request_id=request_id), images, timeout
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
    ) -> AsyncGenerator[Item[list[Prediction]], None]: ...
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
    ) -> AsyncGenerator[Item[npt.NDArray[np.float32]], None]: ...
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
    ) -> AsyncGenerator[Item[Features], None]: ...
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
    ) -> AsyncGenerator[Item[Analysis], None]: ...
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
    ) -> AsyncGenerator[Item[AnswersT], None]: ...
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
    ) -> AsyncGenerator[Item[Any], None]: ...
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
    ) -> AsyncGenerator[Item[Any], None]:
        """Answer any number of images, in order, in bounded memory.

        Images are read ahead, sent and answered while you work on earlier ones. A plain iterable
        is read in a thread of its own, so it may block. Closing the iterator early (leaving the
        loop, or `close()`/`aclose()`) cancels what is in flight; an `async for` that may be left
        early wants `contextlib.aclosing`, because Python alone closes it only when it is collected.

        Args:
            images: Any iterable or async iterable of images.
            task: "classify", "probabilities", "embed", "features" or "analyze".
            into: What "analyze" is to answer, as in the method of that name.
            top_k: How many classes; for "classify" and "analyze".
            on_error: What to do with an image that cannot be used: "raise" its BadImage when its
                turn comes, "return" it as an item with `error` set, or "skip" it. All that is not
                the fault of an image, such as a server that went away, raises in any case.
            progress: True for a progress bar on standard error (needs the extra "progress"), or
                a function that is called with the number of images done.
            timeout: Seconds for each request; the client's own if not given.
            request_id: Triton's id for the first request, and with a number ("-2", "-3", …) for the
                others; a made one if not given.
            model_version: Only answers of this model (`Model.version`), such as those kept earlier
                are of. Where the server has another, ModelChanged is raised.

        Yields:
            An Item for each image: `index`, `image`, and `result` as the method of the task
            would return it for this one image.
        """
        batches = self._batches(
            images, task, into, top_k, on_error, progress, timeout, request_id, model_version
        )
        return _flatten(batches, on_error)

    async def model(
        self, *, timeout: float | None = None, model_version: str | None = None
    ) -> Model:
        """What the server serves: name, sizes, classes, precision, whether it is trained.

        Args:
            timeout: Seconds; the client's own if not given.
            model_version: The model of this version; if not given, the one that has answered this
                client last. The server is asked once for each.

        Raises:
            ModelChanged: The server has another one.
            ModelNotServed: A server answers, but it serves other models.
        """
        return await self._engine.connection.model(
            self._timeout(timeout), check_version(model_version)
        )

    async def health(self, *, timeout: float = 5.0) -> Health:
        """Whether the server answers, tried with a real image. Returns instead of raising, and
        does not retry.

        Args:
            timeout: Seconds for all of it.
        """
        return await _health.check(self._engine.connection, check_timeout(timeout))

    async def close(self) -> None:
        """Cancel what is in flight and close the connection. May be called twice."""
        await self._engine.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # -- not public --------------------------------------------------------------------------

    def _timeout(self, timeout: float | None) -> float:
        return (
            self._engine.connection.settings.timeout if timeout is None else check_timeout(timeout)
        )

    async def _check_top_k(self, asked: Question, timeout: float) -> float:
        """Returns what is left of `timeout`."""
        if "predictions" not in asked.answers:
            return timeout
        started = time.monotonic()
        most = (await self.model(timeout=timeout)).max_top_k
        if not isinstance(asked.top_k, int) or not 1 <= asked.top_k <= most:
            raise ValueError(f"top_k must be a whole number from 1 to {most}, not {asked.top_k!r}")
        return max(0.001, timeout - (time.monotonic() - started))

    async def _ask(self, asked: Question, images: Any, timeout: float | None) -> Any:
        with self._engine.connection.telemetry.call(asked):
            seconds = await self._check_top_k(asked, self._timeout(timeout))
            if is_one_image(images):
                annotate(images=1)
                (item,) = await self._engine.chunk(asked, [images], 0, seconds)
                return asked.one(item.result)
            return await self._ask_several(asked, images, seconds)

    async def _ask_several(self, asked: Question, images: Any, seconds: float) -> Any:
        items = await _one_model.ask(self._engine, asked, images, seconds)
        annotate(images=len(items))
        errors = [item.error for item in items if item.error is not None]
        if errors:
            raise BadImages(
                errors, [None if item.error else asked.one(item.result) for item in items]
            )
        return asked.several([item.result for item in items], await self.model())

    def _batches(
        self,
        images: Any,
        task: Task,
        into: type[Any] | None,
        top_k: int,
        on_error: OnError,
        progress: Progress,
        timeout: float | None,
        request_id: str | None,
        model_version: str | None,
    ) -> AsyncGenerator[list[Item[Any]], None]:
        """What `stream` yields, a chunk at a time. Checks its arguments at once."""
        _check_choice("task", task, get_args(Task))
        _check_choice("on_error", on_error, get_args(OnError))
        if is_one_image(images):
            words = mistaken(images) or f"not one {type(images).__name__}"
            raise TypeError(f"stream takes an iterable of images, {words}")
        asked = question(task, top_k, into, request_id=request_id, model_version=model_version)
        source = self._asked_batches(images, asked, self._timeout(timeout))
        traced = self._engine.connection.telemetry.stream(asked, source)
        return _run_batches(traced, images, asked, on_error, progress)

    async def _asked_batches(
        self, images: Any, asked: Question, timeout: float
    ) -> AsyncGenerator[list[Item[Any]], None]:
        await self._check_top_k(asked, timeout)
        batches = self._engine.batches(asked, images, timeout)
        try:
            async for batch in batches:
                yield batch
        finally:
            await batches.aclose()


async def _run_batches(
    batches: AsyncGenerator[list[Item[Any]], None],
    images: Any,
    asked: Question,
    on_error: OnError,
    progress: Progress,
) -> AsyncGenerator[list[Item[Any]], None]:
    with Meter(progress, images) as meter:
        try:
            async for batch in batches:
                yield _settle(batch, asked, on_error)
                meter.add(len(batch))
        finally:
            await batches.aclose()


async def _flatten(
    batches: AsyncGenerator[list[Item[Any]], None], on_error: OnError
) -> AsyncGenerator[Item[Any], None]:
    try:
        async for batch in batches:
            for item in batch:
                if item.error is not None and on_error == "raise":
                    raise item.error
                yield item
    finally:
        await batches.aclose()


def _settle(batch: list[Item[Any]], asked: Question, on_error: OnError) -> list[Item[Any]]:
    """Items that the caller may keep: detached from the response they came in."""
    return [
        item if item.error else replace(item, _result=asked.one(item.result), _sent=None)
        for item in batch
        if item.error is None or on_error != "skip"
    ]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
