"""Opens the gRPC channel for the settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ._settings import Settings, read_file

_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    # gRPC's own limit of 4 MiB is less than eight feature maps.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Use every address that the name resolves to: with the default policy, pick_first, a client
    # stays with one pod of a headless service.
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    # After a connection is lost gRPC resolves the name again, but by default at most every 30 s:
    # long enough for all servers that a client knows to have been replaced.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # Detects a peer that vanished without closing the connection. Triton's defaults allow two pings
    # without data; at a third it closes the connection.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 2),
    # Reconnects within seconds to a server that is back; by default gRPC waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]

_LOOPBACK = re.compile(r"(dns:///|ipv4:|ipv6:)?(localhost|127\.[\d.]+|\[::1\])(:|$)")


def open_channel(settings: Settings) -> grpc.aio.Channel:
    """A channel on the running event loop. Connects on first use."""
    # A dict, so that the caller's options override ours: of duplicates gRPC takes the first.
    merged = dict(_CHANNEL_OPTIONS)
    if _LOOPBACK.match(settings.target):
        # A proxy from the environment cannot reach this machine's loopback interface.
        merged["grpc.enable_http_proxy"] = 0
    if settings.authority:
        # With TLS, also the name that the server's certificate must have.
        merged["grpc.default_authority"] = settings.authority
    options = list({**merged, **dict(settings.channel_options)}.items())
    if not settings.tls:
        return grpc.aio.insecure_channel(settings.target, options=options)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read("ca_file", settings.ca_file),
        private_key=_read("key_file", settings.key_file),
        certificate_chain=_read("cert_file", settings.cert_file),
    )
    return grpc.aio.secure_channel(settings.target, credentials, options=options)


def _read(name: str, path: Path | None) -> bytes | None:
    return None if path is None else read_file(name, path)
