"""Addresses, TLS, headers, settings from the environment, channel options, health."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from vit_client import (
    AccessDenied,
    Client,
    ConfigurationError,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    Unavailable,
)
from vit_client._settings import Settings, parse_url

from .conftest import encoded
from .http2 import http_status, peering
from .proxy import Proxy, proxying

IMAGE = encoded(0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and pairs signed by it: localhost.pem and .key, and only-name.pem and .key for
    vit.example.com."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    (folder / "name").write_text("subjectAltName=DNS:vit.example.com")
    new = "req -newkey rsa:2048 -nodes -days 2"
    for command in (
        f"{new} -x509 -keyout ca.key -out ca.pem -subj /CN=test",
        f"{new} -keyout localhost.key -out localhost.csr -subj /CN=localhost",
        "x509 -req -in localhost.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
        "-extfile names -out localhost.pem",
        f"{new} -keyout only-name.key -out only-name.csr -subj /CN=vit",
        "x509 -req -in only-name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
        "-extfile name -out only-name.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(params=["TLS", "mutual TLS"])
def tls(request: pytest.FixtureRequest, url: str, certificates: Path) -> Iterator[Proxy]:
    pair = [((certificates / f"localhost.{kind}").read_bytes()) for kind in ("key", "pem")]
    ca = (certificates / "ca.pem").read_bytes()
    mutual = request.param == "mutual TLS"
    credentials = grpc.ssl_server_credentials([(pair[0], pair[1])], ca, mutual)
    with proxying(url, credentials) as proxy:
        yield proxy


def test_tls(tls: Proxy, certificates: Path) -> None:
    with Client(
        tls.url,
        ca_file=certificates / "ca.pem",
        cert_file=certificates / "localhost.pem",
        key_file=str(certificates / "localhost.key"),
    ) as client:
        assert client.embed(IMAGE).shape == (64,)


def test_tls_from_the_environment(
    tls: Proxy, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_URL", f"grpcs://{tls.url}")
    monkeypatch.setenv("VIT_CA_FILE", str(certificates / "ca.pem"))
    monkeypatch.setenv("VIT_CERT_FILE", str(certificates / "localhost.pem"))
    monkeypatch.setenv("VIT_KEY_FILE", str(certificates / "localhost.key"))
    with Client() as client:
        assert client.embed(IMAGE).shape == (64,)


def test_a_certificate_of_strangers(tls: Proxy) -> None:
    with Client(tls.url, tls=True) as client, pytest.raises(AccessDenied, match="ca_file"):
        client.embed(IMAGE)


def test_plain_text_where_tls_is_wanted(tls: Proxy) -> None:
    with (
        Client(tls.url, retries=0) as client,
        pytest.raises(Unavailable, match="does it want TLS"),
    ):
        client.embed(IMAGE)


def test_tls_where_plain_text_is_wanted(url: str) -> None:
    with Client(f"grpcs://{url}") as client, pytest.raises(AccessDenied, match="speak TLS"):
        client.embed(IMAGE)


def test_tls_files_are_checked(tmp_path: Path) -> None:
    """On creation of the client: gRPC would only report that no server is reachable."""
    some = tmp_path / "some.pem"
    some.write_text("words")
    with pytest.raises(ConfigurationError, match="both cert_file and key_file"):
        Client(cert_file=some)
    with pytest.raises(ConfigurationError, match="contradicts"):
        Client("grpcs://localhost", tls=False)
    with pytest.raises(ConfigurationError, match=r"ca_file .*missing\.pem.*No such file"):
        Client(ca_file=tmp_path / "missing.pem")
    with pytest.raises(ConfigurationError, match=r"ca_file .* is a directory|Is a directory"):
        Client(ca_file=tmp_path)
    with pytest.raises(ConfigurationError, match=r"ca_file .*some\.pem' has no certificate"):
        Client(ca_file=some)
    with pytest.raises(ConfigurationError, match="not a certificate and its key"):
        Client(cert_file=some, key_file=some)


def test_a_certificate_and_the_key_of_another(certificates: Path) -> None:
    cert, key = certificates / "localhost.pem", certificates / "localhost.key"
    with pytest.raises(ConfigurationError, match=r"not a certificate and its key"):
        Client(cert_file=cert, key_file=certificates / "ca.key")
    with pytest.raises(ConfigurationError, match=r"not a certificate and its key"):
        Client(cert_file=key, key_file=cert)
    encrypt = ["openssl", "rsa", "-in", key, "-aes128", "-passout", "pass:x", "-out", "locked.key"]
    subprocess.run(encrypt, cwd=certificates, check=True, capture_output=True)
    with pytest.raises(ConfigurationError, match="not encrypted"):  # and there is no prompt
        Client(cert_file=cert, key_file=certificates / "locked.key")
    Client(cert_file=cert, key_file=key).close()


# -- authority ---------------------------------------------------------------------------------


@pytest.mark.parametrize("authority", ["vit.default.example.com", "vit.example.com:8080"])
def test_the_authority_is_sent(monkeypatch: pytest.MonkeyPatch, authority: str) -> None:
    def ask(client: Client) -> None:
        with client, pytest.raises(ModelNotServed):
            client.model()

    with peering("", *[http_status(404)] * 2) as peer:
        ask(Client(peer.url))
        assert peer.url.encode() in peer.headers
        ask(Client(peer.url, authority=authority))
        assert authority.encode() in peer.headers
        assert peer.url.encode() not in peer.headers
    monkeypatch.setenv("VIT_AUTHORITY", authority)
    with peering("", http_status(404)) as peer:
        ask(Client(peer.url))
        assert authority.encode() in peer.headers


def test_with_tls_the_authority_is_the_name_of_the_certificate(
    url: str, certificates: Path
) -> None:
    """The certificate is for localhost, but the address is not."""
    pair = [((certificates / f"only-name.{kind}").read_bytes()) for kind in ("key", "pem")]
    credentials = grpc.ssl_server_credentials([(pair[0], pair[1])])
    ca = certificates / "ca.pem"
    with proxying(url, credentials) as proxy:
        with Client(proxy.url, ca_file=ca, authority="vit.example.com") as client:
            assert client.embed(IMAGE).shape == (64,)
        with Client(proxy.url, ca_file=ca, authority="vit.example.com:443") as client:
            assert client.embed(IMAGE).shape == (64,)
        for other in (None, "other.example.com"):
            with (
                Client(proxy.url, ca_file=ca, authority=other) as client,
                pytest.raises(AccessDenied, match="certificate for another name"),
            ):
                client.embed(IMAGE)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_authority_is_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VIT_AUTHORITY", name)
    assert settings().authority is None


# -- token and headers -------------------------------------------------------------------------


def test_token_and_headers_are_sent(proxy: Proxy) -> None:
    with Client(proxy.url, token="secret", headers={"X-Tenant": "zoo"}) as client:
        client.embed(IMAGE)
    assert proxy.headers["authorization"] == "Bearer secret"
    assert proxy.headers["x-tenant"] == "zoo"


def test_token_and_headers_from_the_environment(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_TOKEN", "secret")
    monkeypatch.setenv("VIT_HEADERS", "x-tenant: zoo, x-other: 1:2")
    with Client(proxy.url) as client:
        client.health()
    assert proxy.headers["authorization"] == "Bearer secret"
    assert proxy.headers["x-tenant"] == "zoo"
    assert proxy.headers["x-other"] == "1:2"


def test_a_wrong_token(proxy: Proxy) -> None:
    proxy.refusals = [(grpc.StatusCode.UNAUTHENTICATED, "who are you?")]
    with Client(proxy.url) as client, pytest.raises(AccessDenied, match="who are you"):
        client.embed(IMAGE)
    assert proxy.inferences == 1


@pytest.mark.parametrize(
    ("url", "target", "tls"),
    [
        ("localhost", "localhost:8001", False),
        ("10.0.0.1:9000", "10.0.0.1:9000", False),
        ("[::1]", "[::1]:8001", False),
        ("grpc://vit.example", "vit.example:8001", False),
        ("grpcs://vit.example:443/", "vit.example:443", True),
        ("dns:///vit.default.svc", "dns:///vit.default.svc:8001", False),
        ("dns:///vit.default.svc:9000", "dns:///vit.default.svc:9000", False),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", "ipv4:10.0.0.1:1,10.0.0.2:1", False),
        ("unix:/run/vit.sock", "unix:/run/vit.sock", False),
        ("unix:///run/vit.sock", "unix:///run/vit.sock", False),
    ],
)
def test_addresses(url: str, target: str, tls: bool) -> None:
    assert parse_url(url) == (target, tls)


@pytest.mark.parametrize(
    "url",
    [
        *("http://localhost:8000", "https://x", "localhost:", "a b", "localhost:99999", "x/y"),
        *(":8001", "localhost:0", "dns:", "unix:", "ipv4: 10.0.0.1:1", "tcp://vit:8001"),
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigurationError, match="address"):
        Client(url)


def settings(url: str | None = None, **given: object) -> Settings:
    names = (
        *("authority", "timeout", "retries", "concurrency", "token", "headers", "tls"),
        *("ca_file", "cert_file", "key_file", "channel_options"),
    )
    arguments = {**dict.fromkeys(names), **given}
    return Settings.resolve(url, **arguments)  # type: ignore[arg-type]


def test_without_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("VIT_"):
            monkeypatch.delenv(name)
    found = settings()
    assert (found.target, found.timeout, found.retries) == ("localhost:8001", 60, 4)
    assert (found.concurrency, found.tls, found.metadata) == (16, False, ())
    assert found.authority is None


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("VIT_URL", "vit:1", "target", "vit:1"),
        ("VIT_URL", " vit:1\n", "target", "vit:1"),
        ("VIT_URL", " ", "target", "localhost:8001"),
        ("VIT_URL", "GRPCS://vit", "target", "vit:8001"),
        ("VIT_URL", "GRPCS://vit", "tls", True),
        ("VIT_AUTHORITY", " vit.example\n", "authority", "vit.example"),
        ("VIT_TIMEOUT", "2.5", "timeout", 2.5),
        ("VIT_TIMEOUT", " 5 ", "timeout", 5),
        ("VIT_TIMEOUT", "1e2", "timeout", 100),
        ("VIT_TIMEOUT", "", "timeout", 60),
        ("VIT_TIMEOUT", "\n", "timeout", 60),
        ("VIT_RETRIES", "7", "retries", 7),
        ("VIT_RETRIES", " 0\n", "retries", 0),
        ("VIT_CONCURRENCY", "3", "concurrency", 3),
        *[("VIT_TLS", text, "tls", True) for text in ("1", "TRUE", "yes", " on\n")],
        *[("VIT_TLS", text, "tls", False) for text in ("0", "False", "NO", "off ", "", " ")],
        ("VIT_TOKEN", "secret\n", "metadata", (("authorization", "Bearer secret"),)),
        ("VIT_TOKEN", "\n", "metadata", ()),
        ("VIT_HEADERS", " a : 1:2 , B:, ", "metadata", (("a", "1:2"), ("b", ""))),
        ("VIT_HEADERS", "a: 1, 2\nb: x,y\n", "metadata", (("a", "1, 2"), ("b", "x,y"))),
        ("VIT_HEADERS", " ", "metadata", ()),
        *[(f"VIT_{kind}_FILE", "", "tls", False) for kind in ("CA", "CERT", "KEY")],
    ],
)
def test_settings_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str, expected: object
) -> None:
    monkeypatch.setenv(variable, value)
    assert getattr(settings(), name) == expected


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("VIT_URL", "a b", "'a b' is not an address"),
        ("VIT_URL", "http://vit:8000", "is an HTTP address"),
        ("VIT_URL", "vit:8001/v2", "is not an address"),
        ("VIT_URL", "vit:0", "is not an address"),
        ("VIT_URL", "::1", r"and IPv6 as \[::1\]:8001"),
        ("VIT_AUTHORITY", "https://vit.example", "must be a host name"),
        ("VIT_AUTHORITY", "a b", "must be a host name"),
        ("VIT_TIMEOUT", "soon", "is not a number of seconds"),
        ("VIT_TIMEOUT", "5s", "is not a number of seconds"),
        ("VIT_TIMEOUT", "0", "must be a number of seconds above 0"),
        ("VIT_TIMEOUT", "-1", "above 0"),
        ("VIT_TIMEOUT", "nan", "above 0"),
        ("VIT_TIMEOUT", "inf", "below a million"),
        ("VIT_RETRIES", "many", "is not a whole number"),
        ("VIT_RETRIES", "1e2", "is not a whole number"),
        ("VIT_RETRIES", "2.5", "is not a whole number"),
        ("VIT_RETRIES", "-1", "must be a whole number of at least 0"),
        ("VIT_CONCURRENCY", "0", "must be a whole number of at least 1"),
        ("VIT_CONCURRENCY", "inf", "is not a whole number"),
        ("VIT_TLS", "maybe", "is not 0 or 1"),
        ("VIT_TLS", "2", "is not 0 or 1"),
        ("VIT_TOKEN", "two\nlines", "is not printable ASCII"),
        ("VIT_TOKEN", "é", "is not printable ASCII"),
        ("VIT_HEADERS", "no colon", "name: value, name: value"),
        ("VIT_HEADERS", "accept: a,b", "give each header a line of its own"),
        ("VIT_HEADERS", "bad name: x", "'bad name' is not a valid name for a gRPC text header"),
        ("VIT_HEADERS", ": x", "is not a valid name for a gRPC text header"),
        ("VIT_HEADERS", "x: é", "the value of header 'x'"),
        ("VIT_CA_FILE", "/no/such.pem", r"/no/such\.pem': No such file"),
        ("VIT_CA_FILE", "/", "Is a directory"),
        ("VIT_CERT_FILE", "/no/such.pem", "No such file"),
        ("VIT_KEY_FILE", "/no/such.pem", "No such file"),
    ],
)
def test_bad_settings_are_named(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=f"{variable}.*{words}") as caught:
        Client()
    if variable == "VIT_TOKEN":
        assert value not in str(caught.value)


def test_arguments_win_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, certificates: Path
) -> None:
    for name in (
        "TIMEOUT",
        "RETRIES",
        "CONCURRENCY",
        "TLS",
        "URL",
        "AUTHORITY",
        "TOKEN",
        "HEADERS",
    ):
        monkeypatch.setenv(f"VIT_{name}", "wrong value:")
    monkeypatch.setenv("VIT_CA_FILE", "/no/such.pem")
    given = settings(
        "vit:1",
        authority="a",
        timeout=1,
        retries=0,
        concurrency=1,
        tls=False,
        token="",
        headers={},
    )
    assert (given.target, given.authority, given.timeout) == ("vit:1", "a", 1)
    assert (given.retries, given.concurrency, given.tls) == (0, 1, False)
    assert (given.metadata, given.ca_file) == ((), None)
    assert settings(
        "vit",
        timeout=1,
        retries=0,
        concurrency=1,
        tls=True,
        ca_file=certificates / "ca.pem",
        token="t",
        headers={},
        authority="a",
    ).tls


@pytest.mark.parametrize("url", ["ipv4:vit:8001", "ipv6:::1"])
def test_what_is_no_address_to_grpc(url: str) -> None:
    with (
        Client(url) as client,
        pytest.raises(ConfigurationError, match=f"'{url}' is not a valid addr"),
    ):
        client.model()


@pytest.mark.parametrize("headers", [{"bad name": "x"}, {"x": "new\nline"}])
def test_bad_headers(headers: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="header"):
        Client(headers=headers)


def test_large_messages_pass_whatever_the_channel_options(url: str) -> None:
    """gRPC's default limit is 4 MiB; this image is larger."""
    big = b"P6 2000 1000 255\n" + bytes(6_000_000)
    with Client(url, channel_options=[("grpc.primary_user_agent", "mine")]) as client:
        assert client.embed(big).shape == (64,)


def test_channel_options_win_over_the_clients_own(url: str) -> None:
    options = [("grpc.max_receive_message_length", 100)]
    with (
        Client(url, channel_options=options) as client,
        pytest.raises(InvalidRequest, match="larger than max"),
    ):
        client.model()


@pytest.mark.parametrize(
    "settings",
    [
        {"token": "é"},
        {"headers": {"x": 1}},
        {"headers": {"x-bin": "abc"}},
        {"timeout": "5"},
        {"retries": "5"},
        {"retries": 2.5},
        {"concurrency": "5"},
        {"tls": "0"},
        {"token": b"secret"},
        {"headers": ["x: 1"]},
        {"authority": 7},
        {"url": b"localhost"},
    ],
)
def test_settings_of_the_wrong_kind(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Client(**settings)


def test_a_gateways_rate_limit_is_overload(proxy: Proxy) -> None:
    proxy.refusals = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "rate limit")]
    with Client(proxy.url, retries=0) as client, pytest.raises(Overloaded, match="rate limit"):
        client.embed(IMAGE)


def test_requests_go_to_all_addresses_in_turn(url: str) -> None:
    with proxying(url) as first, proxying(url) as second:
        with Client(f"ipv4:{first.url},{second.url}") as client:
            for _ in range(20):
                client.embed(IMAGE)
        assert first.inferences + second.inferences == 20
        assert abs(first.inferences - second.inferences) <= 2


def test_names_are_resolved(url: str) -> None:
    with Client(f"dns:///localhost:{url.rpartition(':')[2]}") as client:
        assert client.embed(IMAGE).shape == (64,)


def test_one_of_two_servers_is_down(url: str) -> None:
    with proxying(url) as up, proxying(url) as down:
        client = Client(f"ipv4:{up.url},{down.url}", retries=3)
        client.embed(IMAGE)
    with proxying(url) as up, Client(f"ipv4:127.0.0.1:1,{up.url}", retries=3) as client:
        for _ in range(5):
            client.embed(IMAGE)
    client.close()


def test_health(client: Client, url: str) -> None:
    health = client.health()
    assert health
    assert health.live
    assert health.ready
    assert health.server == "triton 2.51.0"
    assert health.latency is not None
    assert 0 < health.latency < 5
    assert health.problem == ""
    with Client("localhost:1") as nobody:
        health = nobody.health()
    assert not health
    assert not health.live
    assert "no server at localhost:1" in health.problem


def test_healthy_is_what_answers_an_image(proxy: Proxy) -> None:
    """Triton stays ready even if one of its models has died."""
    proxy.refusals = [(grpc.StatusCode.INTERNAL, "Stub process is not healthy")]
    with Client(proxy.url) as client:
        health = client.health()
    assert health.ready
    assert not health
    assert "Stub process is not healthy" in health.problem


def test_a_proxy_does_not_come_between_two_programs_of_one_machine(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    port = url.rpartition(":")[2]
    for address in (f"127.0.0.1:{port}", f"localhost:{port}", f"ipv4:127.0.0.1:{port}"):
        with Client(address, retries=0, timeout=10) as client:
            assert client.health().answering


def test_the_usual_http_port_is_recognised() -> None:
    with Client("localhost:8000", retries=0, timeout=5) as client:
        assert "Its gRPC port is 8001" in client.health().problem
