"""Every error this package raises on purpose.

    VitClientError          catch this one to catch them all
    ├── ConfigurationError  a setting is invalid (also a ValueError)
    ├── ClientClosed        the client was used after close(), after fork or in another event loop
    ├── BadImage            one image cannot be read or decoded; the others are fine
    │   └── BadImages       some images of a list; carries the results of all others
    ├── InvalidRequest      the server rejected the request
    ├── AccessDenied        missing or wrong token, header or certificate, or TLS required
    ├── ModelNotServed      a server responded, but it does not serve these models
    ├── ModelChanged        the model is not the previous or the requested one
    ├── Overloaded          the server is up but has too much load
    ├── Unavailable         no server could be reached, or the connection was lost
    ├── DeadlineExceeded    no response in time (also a TimeoutError)
    └── ServerError         the server failed while processing the request

`retryable` says whether a retry may help. It is true for `Overloaded` and `Unavailable` only, and
both are raised only after the client has retried as often and for as long as its settings allow.
After `DeadlineExceeded` a larger `timeout=` may help. All other errors recur until the image, the
setting or the server is changed.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import grpc

__all__ = [
    "AccessDenied",
    "BadImage",
    "BadImages",
    "ClientClosed",
    "ConfigurationError",
    "DeadlineExceeded",
    "InvalidRequest",
    "ModelChanged",
    "ModelNotServed",
    "Overloaded",
    "ServerError",
    "Unavailable",
    "VitClientError",
]


class VitClientError(Exception):
    """Base class of all errors of this package.

    Attributes:
        message: what went wrong. `str(error)` is the same, followed by the id of the request.
        task: "classify", "probabilities", "embed", "features" or "analyze"; None outside of these.
        details: the server's own message, or None if it sent none.
        request_id: the id of the failed request, as sent to the server and logged by this package
            (`logging.getLogger("vit_client")`); None if there was no request.
    """

    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later, unchanged."""

    def __init__(
        self,
        message: str,
        *,
        task: str | None = None,
        details: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.task = task
        self.details = details
        self.request_id = request_id

    def __str__(self) -> str:
        named = not self.request_id or self.request_id in self.message  # Triton does so
        return self.message if named else f"{self.message} [request {self.request_id}]"

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their positional arguments only, so an error raised in a
        # multiprocessing worker would reach the parent without its attributes.
        return _restore, (type(self), self.args, self.__dict__)


def shortened(name: object, longest: int = 200) -> str:
    """A name, or a text with names, for a message: on one line, with the middle cut out if it is
    longer than `longest` characters."""
    text = str(name)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _restore(kind: type[VitClientError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(VitClientError, ValueError):
    """A constructor argument or VIT_… variable is invalid. The message names it."""


class ClientClosed(VitClientError):
    """The client is closed, or cannot be used in this process or event loop: create a new one."""


class BadImage(VitClientError):
    """One image cannot be used: no such file, not an image, truncated, far too large; or it could
    not be read within the timeout, which is not the server's fault.

    Attributes:
        index: position of the image among those given to the call, from 0.
        name: path or file name of the image, or None for bytes, arrays and the like. The message
            has a very long name shortened.
        reason: what is wrong with the image, in a few words.
    """

    def __init__(
        self,
        reason: str,
        *,
        index: int,
        name: str | None,
        task: str | None = None,
        details: str | None = None,
        request_id: str | None = None,
    ) -> None:
        where = shortened(name) if name is not None else f"image {index}"
        super().__init__(f"{where}: {reason}", task=task, details=details, request_id=request_id)
        self.index = index
        self.name = name
        self.reason = reason


class BadImages(BadImage):
    """Some images of a list cannot be used; the results of all others are in `results`.

    Its attributes as a BadImage describe the first of them (`index`, `name`, `reason`).

    Attributes:
        errors: a BadImage for each image that failed, in order.
        results: one entry per image, in order: what the same call with this image alone would
            return, or None for the images in `errors`.
    """

    def __init__(self, errors: list[BadImage], results: list[Any]) -> None:
        first = errors[0]
        super().__init__(
            first.reason,
            index=first.index,
            name=first.name,
            task=first.task,
            details=first.details,
            request_id=first.request_id,
        )
        self.errors = errors
        self.results = results
        if len(errors) > 1:
            self.message += f" (and {len(errors) - 1} more of {len(results)} images)"
            self.args = (self.message,)


class InvalidRequest(VitClientError):
    """The server, or a proxy in front of it, rejected the request; the message has the reason.
    Never retried."""


class AccessDenied(VitClientError):
    """The server, or a proxy in front of it, requires another token, header or certificate; or one
    side does not trust the other's certificate."""


class ModelNotServed(VitClientError):
    """A server responded, but does not serve (or has not loaded) the models this client needs."""


class ModelChanged(VitClientError):
    """The served model is not the previous one, or not the requested one (`model_version`).

    The results of two models cannot be compared, so they must not be mixed in one array, list or
    file. During a rolling update both may be served for a while; retry when it is over."""


class Overloaded(VitClientError):
    """The server's queue is full, or the request waited in it for too long; or a proxy in front of
    it limits the rate. Send less, or later.

    Attributes:
        retry_after: seconds after which the sender said to try again (gRPC's
            `grpc-retry-pushback-ms`), negative if it said not to; None if it said nothing.
    """

    retryable = True
    retry_after: float | None = None


class Unavailable(VitClientError):
    """No server could be reached at the address, the connection was lost, or the server is starting
    or stopping; or another client's malformed request in the same batch failed this one."""

    retryable = True


class DeadlineExceeded(VitClientError, TimeoutError):
    """There was no response within the timeout, retries included."""


class ServerError(VitClientError):
    """The server failed while processing the request; see its log."""


_OVERLOAD_TEXTS = (
    "exceeds maximum queue size",
    "request timeout expired",
    "failed to increase the shared memory pool size",  # /dev/shm is full
)
# While the server starts, and while it shuts down: of several servers, another one will respond.
_NOT_LOADED = re.compile(r"has no available versions|version \d+ is not at ready state")
# The process of a Python model has exited or hangs.
_MODEL_DIED = "is not healthy"
# The model is served, but not in the requested version, so with other weights.
_OTHER_VERSION = re.compile(r"unknown model: '[^']*' version \d+ is not found")
# A request whose lengths contradict its bytes or its shape fails all others in its batch, in every
# Triton so far, with INVALID_ARGUMENT or INTERNAL. This package sends none, so it was another
# client's. Matched at the start only: the reason why an image is bad may contain any text.
_NEIGHBOUR = re.compile(
    r"(in ensemble '[^']*', )?(incomplete string data for |batch size \d+ for '[^']*', max allowed)"
)

# gRPC reports an untrusted server as UNAVAILABLE. These texts mean a TLS mismatch; a handshake that
# is merely cut off, or times out, counts as a lost connection.
_TLS_TEXTS = ("SSL_ERROR_SSL", "Hostname Verification", "missing selected ALPN")

# A proxy gave up the call, for example for want of memory. Inference changes nothing, so it may be
# repeated.
_RESET = "Received RST_STREAM"

# The server never saw this call: its connection had reached its maximum age, or it is shutting
# down. For a call that was in flight then, gRPC's text has other words before GOAWAY.
_NOT_BEGUN = "Stream removed (GOAWAY received; Error code: 0"

# Statuses of a proxy in front of the server, and of an outgoing proxy (https_proxy) that is asked
# for a tunnel.
_HTTP_STATUS = re.compile(r"Received http2 header with status: (\d+)")
_TUNNEL_STATUS = re.compile(r"HTTP proxy returned response code (\d+)")

# A response without a gRPC status: it is from a web server.
_NOT_GRPC = "Data frame with END_STREAM flag received"

_BY_CODE: dict[grpc.StatusCode, type[VitClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,  # a gateway's rate limit
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.NOT_FOUND: ModelNotServed,
    grpc.StatusCode.UNIMPLEMENTED: ModelNotServed,  # some other gRPC server
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,  # by the server's shutdown; ours raises CancelledError
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}

_LOGIN = (AccessDenied, "redirects us: does it require a login, or TLS (grpcs://)?")
_UNKNOWN_PLACE = (ModelNotServed, "has no gRPC server at this address: is it right?")
_NO_LOGIN = (AccessDenied, "requires a login of its own")
_NO_BACKEND = (Unavailable, "cannot reach the server")

# Ensembles that the first releases of vit-builder did not build. Used only once the server is
# known to have `vit`.
_NEWER = re.compile("unknown model: '(analyze|everything)'")

# What the HTTP status of a proxy means, sent instead of the server's response.
_BY_HTTP_STATUS: dict[int, tuple[type[VitClientError], str]] = {
    **dict.fromkeys((301, 302, 303, 307, 308), _LOGIN),
    401: (AccessDenied, "rejects the token or login"),
    403: (AccessDenied, "denies access"),
    404: _UNKNOWN_PLACE,
    405: _UNKNOWN_PLACE,
    407: _NO_LOGIN,
    408: (Unavailable, "did not receive the whole request in time"),
    410: _UNKNOWN_PLACE,
    413: (InvalidRequest, "does not allow requests this large"),
    421: (ModelNotServed, "does not serve this host name: is the address right?"),
    429: (Overloaded, "allows no more requests at the moment"),
    431: (InvalidRequest, "does not allow headers, or a token, this long"),
    500: (ServerError, "failed"),
    502: _NO_BACKEND,
    503: (Overloaded, "is overloaded, or has no server to forward this to"),  # it may be either
    504: (Unavailable, "got no response from the server in time"),
    511: _NO_LOGIN,
    # Cloudflare's
    **dict.fromkeys((520, 521, 522, 523, 525, 526, 530), _NO_BACKEND),
    524: (Unavailable, "got no response from the server in time"),
}


def from_grpc(
    error: grpc.RpcError, *, url: str, task: str | None, timeout: float, tls: bool = False
) -> VitClientError:
    """Convert a gRPC error. This is the only place that reads gRPC status codes.

    Triton returns UNAVAILABLE for a full queue and for a request that expired in it, like gRPC for
    a lost connection, and NOT_FOUND while it shuts down, so the text has to tell them apart.

    Args:
        tls: Whether the connection uses TLS: without it, no text is taken for a TLS mismatch.
    """
    code: grpc.StatusCode = error.code()
    details: str = error.details() or ""
    lower = details.lower()
    kind = _BY_CODE.get(code, ServerError)
    if status := _HTTP_STATUS.match(details) or _TUNNEL_STATUS.search(details):
        kind, words = _http_meaning(int(status[1]))
        where = f"a proxy in front of {url}" if status.re is _HTTP_STATUS else "the outgoing proxy"
        return kind(f"{where} {words} ({details})", task=task, details=details)
    if any(text in lower for text in _OVERLOAD_TEXTS):
        kind = Overloaded
    elif "larger than max" in lower:  # a message, also RESOURCE_EXHAUSTED
        kind = InvalidRequest
    elif "the target uri is not valid" in lower:
        kind = ConfigurationError
    elif (
        _NOT_LOADED.search(lower)
        or _MODEL_DIED in lower
        or _NEIGHBOUR.match(details)
        or _RESET in details
    ):
        kind = Unavailable
    elif _OTHER_VERSION.search(details):
        kind = ModelChanged
    elif "request for unknown model" in lower or _NOT_GRPC in details:
        kind = ModelNotServed
    elif tls and code is grpc.StatusCode.UNAVAILABLE and any(t in details for t in _TLS_TEXTS):
        kind = AccessDenied
    made = kind(_message(kind, code, details, url, timeout), task=task, details=details or None)
    if isinstance(made, Overloaded):
        made.retry_after = _pushback(error)
    return made


def _pushback(error: grpc.RpcError) -> float | None:
    """What the sender said about retries: seconds, negative for none at all.

    https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback
    """
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-retry-pushback-ms":
            return int(value) / 1000 if re.fullmatch(r"\d{1,9}", value) else -1.0
    return None


def _http_meaning(status: int) -> tuple[type[VitClientError], str]:
    other: type[VitClientError] = InvalidRequest if 400 <= status < 500 else ServerError
    return _BY_HTTP_STATUS.get(status, (other, "rejects the request" if status < 500 else "failed"))


def is_stopping(error: VitClientError) -> bool:
    """Whether a server responded that it is shutting down, or that its model is not loaded."""
    details = (error.details or "").lower()
    said = _NOT_LOADED.search(details) or "server is stopping" in details
    return isinstance(error, Unavailable) and bool(said)


def is_not_begun(error: VitClientError) -> bool:
    """Whether it is certain that no server has started processing the call."""
    return isinstance(error, Unavailable) and (error.details or "").startswith(_NOT_BEGUN)


def is_neighbours(error: VitClientError) -> bool:
    """Whether another client's malformed request, in the same batch, caused it."""
    return isinstance(error, Unavailable) and bool(_NEIGHBOUR.match(error.details or ""))


def is_too_many(error: InvalidRequest) -> bool:
    """Whether a request had more images than the server accepts."""
    return "batch-size must be <=" in (error.details or "")


def is_too_large(error: InvalidRequest, size: int) -> bool:
    """Whether a request of `size` bytes was itself too large, rather than its response."""
    details = error.details or ""
    # The last is what docker/edge says.
    return (
        f"larger than max ({size} vs" in details
        or details.endswith("status: 413")
        or details.startswith("request larger than max")
    )


def _message(
    kind: type[VitClientError], code: grpc.StatusCode, details: str, url: str, timeout: float
) -> str:
    if _NOT_LOADED.search(details):
        return f"the server at {url} has not loaded its models, or is stopping ({details})"
    if _MODEL_DIED in details:
        return f"the server at {url} has lost the process of a model ({details})"
    if _NEIGHBOUR.match(details):
        return (
            f"the server at {url} failed this with another client's malformed request ({details})"
        )
    if _NOT_GRPC in details:
        return f"the server at {url} does not speak gRPC: is it a login page? ({details})"
    if kind is Unavailable:
        return f"no server at {url}{_unavailable_hint(url, details)} ({details or code.name})"
    if kind is DeadlineExceeded:
        return f"no answer from {url} within {timeout:.3g} s"
    if kind is Overloaded:
        return f"the server at {url} is overloaded ({details})"
    if kind is ModelChanged:
        return f"{url} now serves another model than the requested one ({details})"
    if kind is ModelNotServed and _NEWER.search(details):
        return f"the models at {url} were built by a vit-builder older than this client ({details})"
    if kind is ModelNotServed:
        return f"the server at {url} does not serve the vit models ({details or code.name})"
    if kind is AccessDenied:
        return f"the server at {url} {_denied_hint(details)} ({details or code.name})"
    if kind is ConfigurationError:
        return f"{url!r} is not a valid address for gRPC ({details})"
    if kind is InvalidRequest:
        return f"the server rejected the request ({details})"
    return f"the server failed ({code.name}: {details})"


def _unavailable_hint(url: str, details: str) -> str:
    if url.endswith((":8000", ":8002")):
        return ": is this Triton's HTTP or metrics port? Its gRPC port is 8001 by default"
    if "http1.x server" in details:
        return ": something there speaks HTTP/1.1. Is it the HTTP port?"
    if "Handshake read failed" in details or "TSI_DATA_CORRUPTED" in details:
        return (
            ": something listens there, but the TLS handshake failed. Is it starting, or does it "
            "expect plain text (grpc://) or a client certificate (cert_file, key_file)?"
        )
    if "all backends" in details and "Socket closed" in details:
        return (
            ": something listens there, but closes the connection at once. Is it the HTTP port, or "
            "does it want TLS, or another client certificate?"
        )
    return ""


def _denied_hint(details: str) -> str:
    if "certificate has expired" in details:
        return "has a certificate that has expired"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "has a certificate that is not trusted: pass the CA that signed it as ca_file"
    if "Hostname Verification" in details:
        return "has a certificate for another name: use the address that it was issued for"
    if "WRONG_VERSION_NUMBER" in details:
        return "does not speak TLS"
    if "missing selected ALPN" in details:
        return "speaks TLS, but not HTTP/2: is it the gRPC port?"
    if any(text in details for text in _TLS_TEXTS):
        return "could not be reached over TLS: are ca_file, cert_file and key_file right?"
    return "denied access"
