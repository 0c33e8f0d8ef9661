"""Addresses, TLS, headers, settings from the environment, channel options, health."""

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
    Overloaded,
    Unavailable,
)
from vit_client._channel import Settings, parse_url

from .conftest import encoded
from .proxy import Proxy, proxying

IMAGE = encoded(0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and a pair for localhost that it signed: localhost.pem, localhost.key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    new = "req -newkey rsa:2048 -nodes -days 2"
    for command in (
        f"{new} -x509 -keyout ca.key -out ca.pem -subj /CN=test",
        f"{new} -keyout localhost.key -out localhost.csr -subj /CN=localhost",
        "x509 -req -in localhost.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
        "-extfile names -out localhost.pem",
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
    with pytest.raises(ConfigurationError, match="both cert_file and key_file"):
        Client(cert_file="a.pem")
    with pytest.raises(ConfigurationError, match="contradicts"):
        Client("grpcs://localhost", tls=False)
    with (
        Client(ca_file=tmp_path / "missing.pem") as client,
        pytest.raises(ConfigurationError, match=r"ca_file .*missing\.pem"),
    ):
        client.embed(IMAGE)


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
    ["http://localhost:8000", "https://x", "localhost:", "a b", "localhost:99999", "x/y", ":8001"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigurationError, match="address"):
        Client(url)


def settings(**given: object) -> Settings:
    names = (
        *("timeout", "retries", "concurrency", "token", "headers", "tls"),
        *("ca_file", "cert_file", "key_file", "channel_options"),
    )
    arguments = {**dict.fromkeys(names), **given}
    return Settings.resolve(None, **arguments)  # type: ignore[arg-type]


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIT_URL", raising=False)
    assert settings().target == "localhost:8001"
    assert settings().timeout == 60
    for name, value in [
        ("VIT_URL", "vit:1"),
        ("VIT_TIMEOUT", "2.5"),
        ("VIT_RETRIES", "7"),
        ("VIT_CONCURRENCY", "3"),
        ("VIT_TLS", "1"),
    ]:
        monkeypatch.setenv(name, value)
    found = settings()
    assert (found.target, found.timeout, found.retries) == ("vit:1", 2.5, 7)
    assert (found.concurrency, found.tls) == (3, True)
    given = settings(timeout=1, retries=0, concurrency=1, tls=False)
    assert (given.timeout, given.retries, given.concurrency, given.tls) == (1, 0, 1, False)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VIT_TIMEOUT", "soon"),
        ("VIT_TIMEOUT", "0"),
        ("VIT_TIMEOUT", "nan"),
        ("VIT_RETRIES", "many"),
        ("VIT_RETRIES", "-1"),
        ("VIT_CONCURRENCY", "0"),
        ("VIT_TLS", "maybe"),
        ("VIT_HEADERS", "no colon"),
    ],
)
def test_bad_settings_are_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    name = variable.removeprefix("VIT_").lower()
    with pytest.raises(ConfigurationError, match=f"(?i){name}"):
        Client()


@pytest.mark.parametrize("headers", [{"bad name": "x"}, {"x": "new\nline"}])
def test_bad_headers(headers: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="header"):
        Client(headers=headers)


def test_large_messages_pass_whatever_the_channel_options(url: str) -> None:
    """gRPC's own limit is 4 MiB; this image is larger."""
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
    """Triton stays ready when one of its models has died."""
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
        assert "The one for gRPC is 8001" in client.health().problem
