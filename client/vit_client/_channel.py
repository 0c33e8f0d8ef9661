"""Settings and the gRPC channel made from them. All code that knows about either is here."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from .errors import ConfigurationError

DEFAULT_PORT = 8001
DEFAULT_TIMEOUT = 60.0
DEFAULT_RETRIES = 4
DEFAULT_CONCURRENCY = 16

_T = TypeVar("_T")

ChannelOptions = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What the constructor was given, with the environment and the defaults filled in."""

    target: str
    timeout: float
    retries: int
    concurrency: int
    metadata: tuple[tuple[str, str], ...]
    tls: bool
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None
    channel_options: tuple[tuple[str, Any], ...]

    @classmethod
    def resolve(
        cls,
        url: str | None,
        *,
        timeout: float | None,
        retries: int | None,
        concurrency: int | None,
        token: str | None,
        headers: Mapping[str, str] | None,
        tls: bool | None,
        ca_file: str | os.PathLike[str] | None,
        cert_file: str | os.PathLike[str] | None,
        key_file: str | os.PathLike[str] | None,
        channel_options: ChannelOptions | None,
    ) -> Settings:
        """Argument, else environment, else default; a bad value raises ConfigurationError."""
        check_threads()
        url = url or os.environ.get("VIT_URL") or f"localhost:{DEFAULT_PORT}"
        if not isinstance(url, str):
            raise ConfigurationError(f"url must be text, not {url!r}")
        files = {
            name: Path(value) if (value := given or os.environ.get(f"VIT_{name.upper()}")) else None
            for name, given in {
                "ca_file": ca_file,
                "cert_file": cert_file,
                "key_file": key_file,
            }.items()
        }
        target, url_tls = parse_url(url)
        if tls is None:
            tls = _env("VIT_TLS", _boolean, url_tls or any(files.values()))
        if not tls and (url_tls or any(files.values())):
            raise ConfigurationError("tls=False contradicts the grpcs:// address or the TLS files")
        if bool(files["cert_file"]) != bool(files["key_file"]):
            raise ConfigurationError("mutual TLS needs both cert_file and key_file")
        return cls(
            target=target,
            timeout=check_timeout(
                _env("VIT_TIMEOUT", float, DEFAULT_TIMEOUT) if timeout is None else timeout
            ),
            retries=_at_least(0, "retries", _pick(retries, "VIT_RETRIES", DEFAULT_RETRIES)),
            concurrency=_at_least(
                1, "concurrency", _pick(concurrency, "VIT_CONCURRENCY", DEFAULT_CONCURRENCY)
            ),
            metadata=_metadata(token or os.environ.get("VIT_TOKEN"), headers),
            tls=tls,
            channel_options=tuple(channel_options or ()),
            **files,
        )

    def open(self) -> grpc.aio.Channel:
        """A channel on the running event loop. Connects on first use."""
        # By name, so that options of the caller win one by one: of two with one name gRPC takes
        # the first.
        merged = dict(_CHANNEL_OPTIONS)
        if _LOOPBACK.match(self.target):
            # A proxy from the environment cannot reach this machine's own loopback.
            merged["grpc.enable_http_proxy"] = 0
        options = list({**merged, **dict(self.channel_options)}.items())
        if not self.tls:
            return grpc.aio.insecure_channel(self.target, options=options)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_read("ca_file", self.ca_file),
            private_key=_read("key_file", self.key_file),
            certificate_chain=_read("cert_file", self.cert_file),
        )
        return grpc.aio.secure_channel(self.target, credentials, options=options)


_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    # gRPC's own limit of 4 MiB is less than eight feature maps.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Every address that the name resolves to takes its share: with the default policy a client
    # stays with one pod of a headless service for good.
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    # After a connection is lost gRPC looks the name up again, but by default not twice in 30 s:
    # long enough for a client to know none but servers that have been replaced since.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # Finds a peer that vanished without a word. Two pings without data are what Triton's
    # defaults let pass; a third would make it close the connection.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 2),
    # A server that comes back is found within seconds; gRPC's default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]

_LOOPBACK = re.compile(r"(dns:///|ipv4:|ipv6:)?(localhost|127\.[\d.]+|\[::1\])(:|$)")

_SCHEMES = {"grpc": False, "grpcs": True}


def parse_url(url: str) -> tuple[str, bool]:
    """Split an address into gRPC's target and whether it asks for TLS.

    Takes "host", "host:port", "[::1]:port", "grpc://…", "grpcs://…" (TLS) and gRPC's own
    "dns:///name:port", "ipv4:…", "ipv6:…" and "unix:…".
    """
    match = re.match(r"([a-z0-9+.-]+)://(?!/)(.*)", url, re.IGNORECASE)
    if match:
        scheme, rest = match[1].lower(), match[2].rstrip("/")
        if scheme in ("http", "https"):
            raise ConfigurationError(
                f"{url!r} is an HTTP address; this client speaks gRPC: "
                f"give host:port of Triton's gRPC port (usually {DEFAULT_PORT})"
            )
        if scheme in _SCHEMES:
            return _with_port(rest, url), _SCHEMES[scheme]
    if url.startswith("dns:///"):
        return "dns:///" + _with_port(url[len("dns:///") :], url), False
    if re.match(r"(dns|ipv4|ipv6|unix|unix-abstract|xds|passthrough):", url):
        return url, False
    return _with_port(url, url), False


def _with_port(address: str, url: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?", address)
    if not match or int(match[2] or 1) > 65535:
        raise ConfigurationError(f"{url!r} is not an address: give host:port, e.g. localhost:8001")
    return f"{match[1]}:{match[2] or DEFAULT_PORT}"


def _metadata(token: str | None, headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    pairs = dict(headers) if headers is not None else _env("VIT_HEADERS", _header_list, {})
    # gRPC takes lower-case names only.
    pairs = {name.lower(): value for name, value in pairs.items()}
    if token:
        pairs["authorization"] = f"Bearer {token}"
    for name, value in pairs.items():
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise ConfigurationError(f"the value of header {name!r} is not printable ASCII text")
        if not re.fullmatch(r"[a-z0-9_.-]+", name) or name.endswith("-bin"):
            raise ConfigurationError(f"{name!r} is not the name of a text header in gRPC")
    return tuple(pairs.items())


def _header_list(text: str) -> dict[str, str]:
    pairs = [part.partition(":") for part in text.split(",") if part.strip()]
    if not all(colon for _, colon, _ in pairs):
        raise ValueError
    return {name.strip(): value.strip() for name, _, value in pairs}


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError


_EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number of seconds",
    _boolean: "0 or 1",
    _header_list: '"name: value, name: value"',
}


def _env(variable: str, parse: Any, default: _T) -> _T:
    text = os.environ.get(variable, "")
    if not text:
        return default
    try:
        value: _T = parse(text)
    except ValueError:
        raise ConfigurationError(f"{variable}={text!r} is not {_EXPECTED[parse]}") from None
    return value


def _pick(given: int | None, variable: str, default: int) -> int:
    return _env(variable, int, default) if given is None else given


def _at_least(minimum: int, name: str, value: int) -> int:
    if value < minimum:
        raise ConfigurationError(f"{name} must be {minimum} or more, not {value}")
    return value


def check_timeout(seconds: float) -> float:
    """A timeout must be finite: a call that can hang for ever will."""
    if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
        raise ConfigurationError(f"timeout must be a number of seconds above 0, not {seconds!r}")
    return seconds


def check_threads() -> None:
    """Refuse to work where gevent or eventlet has replaced what asyncio stands on: gRPC's own
    threads know nothing of greenlets, and the first call would wait for ever, deaf to its timeout
    and to Ctrl-C."""
    for library, patch in (("gevent", "monkey.patch_all"), ("eventlet", "monkey_patch")):
        if any(_patched(library, module) for module in ("thread", "threading", "select")):
            raise ConfigurationError(
                f"{library} has replaced this process's threads, and gRPC's asyncio cannot work "
                "with greenlets: use real threads or processes (gunicorn --worker-class gthread, "
                f"celery --pool threads), or {library}.{patch}(thread=False, select=False)"
            )


def _patched(library: str, module: str) -> bool:
    if library == "gevent" and "gevent.monkey" in sys.modules:
        return bool(sys.modules["gevent.monkey"].is_module_patched(module))
    if library == "eventlet" and "eventlet.patcher" in sys.modules:
        return bool(sys.modules["eventlet.patcher"].is_monkey_patched(module))
    return False


def _read(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{name} {str(path)!r}: {error.strerror}") from None
