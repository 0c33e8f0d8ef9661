"""Triton's traces: spans sent to a collector by OpenTelemetry's protocol over HTTP (OTLP)."""

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

PATH = "/v1/traces"  # the standard path of a collector
SERVICE = "vit-server"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-([0-9a-f]{2})(-.*)?")
CRASH = (
    "this tritonserver (2.51) may crash (exit code 139) after some thousands of traced requests; "
    "NVIDIA's images from 25.04 on do not"
)


def endpoint(text: str) -> str:
    """Return a collector's URL, with the default path if it has none. Raises ValueError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(text)
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError(text)
    return parts._replace(path=PATH).geturl() if parts.path in ("", "/") else text


def told(url: str) -> str:
    """Return `url` without secrets: user, password and the query, which may hold tokens."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def flags(url: str, rate: int) -> list[str]:
    """Return tritonserver's flags. It traces one in `rate` of the requests without a traceparent.

    Its OpenTelemetry library reads from the environment: OTEL_RESOURCE_ATTRIBUTES (but not the
    service's name), OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT and _CERTIFICATE, and OTEL_BSP_*.
    """
    return [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        f"--trace-config=rate={rate}",  # 0: only requests with a traceparent
        f"--trace-config=opentelemetry,url={url}",
        f"--trace-config=opentelemetry,resource=service.name={_service()}",
    ]


def _service() -> str:
    """Return the service's name by OpenTelemetry's variables, which Triton itself overrides."""
    name = os.environ.get("OTEL_SERVICE_NAME", "").strip()
    for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, _, value = pair.partition("=")
        if key.strip() == "service.name":
            name = name or unquote(value.strip())
    return name or SERVICE


def unwanted(headers: Mapping[str, str]) -> bool:
    """Return whether the caller's trace is not sampled: Triton would export its spans anyway."""
    found = _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip())
    return found is not None and not int(found[1], 16) & 1
