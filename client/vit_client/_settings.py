"""The constructor's arguments, completed from the environment and the defaults."""

from __future__ import annotations

import os
import re
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigurationError

DEFAULT_PORT = 8001
DEFAULT_TIMEOUT = 60.0
DEFAULT_RETRIES = 4
DEFAULT_CONCURRENCY = 16

ChannelOptions = Sequence[tuple[str, Any]]
FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Settings:
    """Validated settings."""

    target: str
    authority: str | None
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
        authority: str | None,
        timeout: float | None,
        retries: int | None,
        concurrency: int | None,
        token: str | None,
        headers: Mapping[str, str] | None,
        tls: bool | None,
        ca_file: FilePath | None,
        cert_file: FilePath | None,
        key_file: FilePath | None,
        channel_options: ChannelOptions | None,
    ) -> Settings:
        """Argument, else environment, else default; an invalid value raises ConfigurationError."""
        check_threads()
        target, url_tls = _address(url)
        files = {
            name: Path(given) if given else None
            for name, given in {
                "ca_file": ca_file,
                "cert_file": cert_file,
                "key_file": key_file,
            }.items()
        }
        labels = {name: name for name in files}
        if tls is not False:  # tls=False ignores files from the environment too
            for name in files:
                if files[name] is None and (value := _environment(name)):
                    files[name], labels[name] = Path(value), _variable(name)
        wanted = url_tls or any(files.values())
        use_tls, label = _setting("tls", tls, _boolean, wanted)
        if not isinstance(use_tls, bool):
            raise ConfigurationError(f"{label} must be True or False, not {use_tls!r}")
        if wanted and not use_tls:
            raise ConfigurationError(f"{label}=0 contradicts the grpcs:// address or the TLS files")
        _check_files(files, labels)
        most, most_label = _setting("concurrency", concurrency, _whole, DEFAULT_CONCURRENCY)
        again, again_label = _setting("retries", retries, _whole, DEFAULT_RETRIES)
        return cls(
            target=target,
            authority=_authority(authority),
            timeout=check_timeout(*_setting("timeout", timeout, _number, DEFAULT_TIMEOUT)),
            retries=_at_least(0, again, again_label),
            concurrency=_at_least(1, most, most_label),
            metadata=_metadata(token, headers),
            tls=use_tls,
            channel_options=tuple(channel_options or ()),
            **files,
        )


# -- from the environment ----------------------------------------------------------------------


def _variable(name: str) -> str:
    return f"VIT_{name.upper()}"


def _environment(name: str) -> str:
    # Variables set from files and secrets often end with a newline.
    return os.environ.get(_variable(name), "").strip()


def _setting(name: str, given: Any, parse: Callable[[str], Any], default: Any) -> tuple[Any, str]:
    """The value, and its name for messages."""
    if given is not None:
        return given, name
    text = _environment(name)
    if not text:
        return default, name
    try:
        return parse(text), _variable(name)
    except ValueError as error:
        raise ConfigurationError(f"{_variable(name)}={text!r} is not {error}") from None


def _text(text: str) -> str:
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number of seconds") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("0 or 1")


def _header_list(text: str) -> dict[str, str]:
    lines = text.splitlines()
    # With one header per line, values may contain commas.
    parts = lines if len(lines) > 1 else text.split(",")
    pairs = [part.partition(":") for part in parts if part.strip()]
    if not all(colon for _, colon, _ in pairs):
        raise ValueError(
            '"name: value, name: value"; with commas in a value, give each header a line of its own'
        )
    return {name.strip(): value.strip() for name, _, value in pairs}


# -- address -----------------------------------------------------------------------------------


def _address(given: str | None) -> tuple[str, bool]:
    url, label = _setting("url", given or None, _text, f"localhost:{DEFAULT_PORT}")
    if not isinstance(url, str):
        raise ConfigurationError(f"url must be text, not {url!r}")
    try:
        return parse_url(url.strip())
    except ConfigurationError as error:
        raise ConfigurationError(f"{label}: {error}") from None


_SCHEMES = {"grpc": False, "grpcs": True}


def parse_url(url: str) -> tuple[str, bool]:
    """Split an address into gRPC's target and whether it requests TLS.

    Accepts "host", "host:port", "[::1]:port", "grpc://…", "grpcs://…" (TLS) and gRPC's own
    "dns:///name:port", "ipv4:…", "ipv6:…" and "unix:…".
    """
    match = re.match(r"([a-z0-9+.-]+)://(?!/)(.*)", url, re.IGNORECASE)
    if match:
        scheme, rest = match[1].lower(), match[2].rstrip("/")
        if scheme in ("http", "https"):
            raise ConfigurationError(
                f"{url!r} is an HTTP address; this client speaks gRPC: "
                f"pass host:port of Triton's gRPC port (usually {DEFAULT_PORT})"
            )
        if scheme in _SCHEMES:
            return _with_port(rest, url), _SCHEMES[scheme]
    if url.startswith("dns:///"):
        return "dns:///" + _with_port(url[len("dns:///") :], url), False
    # gRPC's own schemes, which gRPC validates itself.
    if re.fullmatch(r"(dns|ipv4|ipv6|unix|unix-abstract|xds|passthrough):\S+", url):
        return url, False
    return _with_port(url, url), False


def _with_port(address: str, url: str) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?", address)
    if not match or not 0 < int(match[2] or 1) < 65536:
        hint = ", and IPv6 as [::1]:8001" if address.count(":") > 1 else ""
        raise ConfigurationError(
            f"{url!r} is not an address: pass host:port, e.g. localhost:8001{hint}"
        )
    return f"{match[1]}:{match[2] or DEFAULT_PORT}"


def host_and_port(target: str) -> tuple[str, int] | tuple[str]:
    """Host and port of gRPC's target, for spans; the whole target if it has another form."""
    one = r"(?:dns:///|ipv[46]:)?\[?([^\s/,\[\]]+?)\]?:(\d+)"
    match = re.fullmatch(one, target)
    return (match[1], int(match[2])) if match else (target,)


def _authority(given: str | None) -> str | None:
    name, label = _setting("authority", given or None, _text, None)
    if name is None:
        return None
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+(:\d{1,5})?", name):
        raise ConfigurationError(
            f"{label} must be a host name, optionally with a port, not {name!r}"
        )
    return name


# -- authentication ----------------------------------------------------------------------------


def _metadata(token: str | None, headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    pairs, label = _setting("headers", headers, _header_list, {})
    if not isinstance(pairs, Mapping):
        raise ConfigurationError(f"{label} must be a dict of names and values")
    metadata = {}
    for name, value in pairs.items():
        lower = str(name).lower()  # gRPC accepts only lower case
        if not is_header(lower, ""):
            raise ConfigurationError(
                f"{label}: {name!r} is not a valid name for a gRPC text header"
            )
        if not _is_sendable(value):
            raise ConfigurationError(
                f"{label}: the value of header {name!r} is not printable ASCII text"
            )
        metadata[lower] = value
    secret, label = _setting("token", token, _text, "")
    if not _is_sendable(secret):  # a secret: not shown in the message
        raise ConfigurationError(f"{label} is not printable ASCII text")
    if secret := secret.strip():
        metadata["authorization"] = f"Bearer {secret}"
    return tuple(metadata.items())


def is_header(name: str, value: str) -> bool:
    """Whether gRPC accepts it as text metadata."""
    named = re.fullmatch(r"[a-z0-9_.-]+", name) and not name.endswith("-bin")
    return bool(named) and _is_sendable(value)


def _is_sendable(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.strip().isprintable()


def _check_files(files: Mapping[str, Path | None], labels: Mapping[str, str]) -> None:
    """Check that gRPC can use the files: its own errors do not say what is wrong."""
    for name, path in files.items():
        if path is not None:
            read_file(labels[name], path)
    ca, cert, key = files["ca_file"], files["cert_file"], files["key_file"]
    if bool(cert) != bool(key):
        raise ConfigurationError("mutual TLS needs both cert_file and key_file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")  # the strength of a key is not checked here
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError:
            raise ConfigurationError(
                f"{labels['ca_file']} {str(ca)!r} has no certificate in PEM form"
            ) from None
    if cert is not None and key is not None:
        try:
            context.load_cert_chain(cert, key, password="")  # else it prompts for one
        except ssl.SSLError:
            raise ConfigurationError(
                f"{labels['cert_file']} {str(cert)!r} and {labels['key_file']} {str(key)!r} are "
                "not a certificate and its key, both in PEM form and not encrypted"
            ) from None


def read_file(label: str, path: Path) -> bytes:
    """The contents of a file with certificates or a key."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{label} {str(path)!r}: {error.strerror}") from None


# -- limits ------------------------------------------------------------------------------------


def _at_least(minimum: int, value: Any, label: str) -> int:
    if not isinstance(value, int) or value < minimum:
        raise ConfigurationError(
            f"{label} must be a whole number of at least {minimum}, not {value!r}"
        )
    return value


def check_timeout(seconds: Any, label: str = "timeout") -> float:
    """Validate a timeout. It must be finite, so that no call can hang forever."""
    if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
        raise ConfigurationError(
            f"{label} must be a number of seconds above 0 and below a million, not {seconds!r}"
        )
    return seconds


# -- threads -----------------------------------------------------------------------------------


def check_threads() -> None:
    """Raise ConfigurationError if gevent or eventlet has patched what asyncio relies on: gRPC's own
    threads do not run greenlets, and the first call would hang forever, ignoring its timeout and
    Ctrl-C."""
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
