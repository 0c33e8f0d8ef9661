"""Triton's own traces: its spans go to a collector, by OpenTelemetry's protocol over HTTP."""

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

PATH = "/v1/traces"  # of a collector
SERVICE = "vit-server"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-([0-9a-f]{2})(-.*)?")
CRASH = (
    "this tritonserver (2.51) may crash (exit code 139) after some thousands of traced requests; "
    "NVIDIA's images from 25.04 on do not"
)


def endpoint(text: str) -> str:
    """A collector's URL, completed. Raises ValueError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(text)
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError(text)
    return parts._replace(path=PATH).geturl() if parts.path in ("", "/") else text


def told(url: str) -> str:
    """`url` without what is nobody else's: user and password, and a query, where tokens are."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def flags(url: str, rate: int) -> list[str]:
    """For tritonserver. Of requests without a trace of their own it traces one in `rate`.

    Its library reads from the environment: OTEL_RESOURCE_ATTRIBUTES (but not the name of the
    service), OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT and _CERTIFICATE, and OTEL_BSP_*.
    """
    return [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        f"--trace-config=rate={rate}",  # with 0 those alone that have one
        f"--trace-config=opentelemetry,url={url}",
        f"--trace-config=opentelemetry,resource=service.name={_service()}",
    ]


def _service() -> str:
    """The name of this service, where OpenTelemetry has it: Triton would call itself by its own."""
    name = os.environ.get("OTEL_SERVICE_NAME", "").strip()
    for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, _, value = pair.partition("=")
        if key.strip() == "service.name":
            name = name or unquote(value.strip())
    return name or SERVICE


def unwanted(headers: Mapping[str, str]) -> bool:
    """Whether a caller says that its trace is not kept: Triton would send its part all the same."""
    found = _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip())
    return found is not None and not int(found[1], 16) & 1
