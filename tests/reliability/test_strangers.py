"""Unauthorized access, and files with misleading contents."""

import contextlib
import datetime
import json
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trustme
import vit_builder
from conftest import BIN, GOLDENS, PHOTOS, Server, serving
from processes import FREE_PORTS, listening, tritonserver
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException
from vit_client import AccessDenied, BadImage, Client, Unavailable, VitClientError

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
LONG_AGO = {
    "not_before": datetime.datetime(2020, 1, 1),
    "not_after": datetime.datetime(2021, 1, 1),
}


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path

    @property
    def client(self) -> dict[str, Path]:
        return {"cert_file": self.certificate, "key_file": self.key}

    @property
    def server(self) -> list[str]:
        return ["--tls-certificate", str(self.certificate), "--tls-key", str(self.key)]


class Certificates:
    """Created here, by a trusted authority and an untrusted one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, stranger = trustme.CA(), trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        here = ("localhost", "127.0.0.1")
        self.good = self.save("good", self.authority.issue_cert(*here))
        self.expired = self.save("expired", self.authority.issue_cert(*here, **LONG_AGO))
        self.elsewhere = self.save("elsewhere", self.authority.issue_cert("other.example"))
        self.strange = self.save("strange", stranger.issue_cert(*here))
        self.self_signed = Pair(folder / "self.pem", folder / "self.key")
        stranger.cert_pem.write_to_path(self.self_signed.certificate)
        stranger.private_key_pem.write_to_path(self.self_signed.key)

    def save(self, name: str, issued: trustme.LeafCert) -> Pair:
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        pair.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(pair.key)
        return pair


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def mutual(tiny_repository: Path, certificates: Certificates) -> Iterator[Server]:
    """A server with mutual TLS: it requires a certificate of the authority."""
    client_ca = ["--tls-client-ca", str(certificates.ca)]
    with serving(tiny_repository, *certificates.good.server, *client_ca) as server:
        yield server


# -- TLS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good", "expired", "elsewhere", "strange", "self_signed"])
def test_certificate_of_the_server(
    tiny_repository: Path, certificates: Certificates, name: str
) -> None:
    pair: Pair = getattr(certificates, name)
    with serving(tiny_repository, *pair.server) as server:
        assert server.url.startswith("grpcs://127.0.0.1:")
        with Client(server.url, ca_file=certificates.ca, retries=0, timeout=60) as client:
            if name == "good":
                assert client.embed(PHOTO).shape == (64,)
            else:
                reasons = {"elsewhere": "for another name", "expired": "that has expired"}
                reason = reasons.get(name, "that is not trusted")
                with pytest.raises(AccessDenied, match=f"has a certificate {reason}") as caught:
                    client.embed(PHOTO)
                assert not caught.value.retryable


def test_a_certificate_that_the_server_trusts(mutual: Server, certificates: Certificates) -> None:
    mine = certificates.good.client
    with Client(mutual.url, ca_file=certificates.ca, **mine) as client:
        assert client.embed(PHOTO).shape == (64,)
    with (
        Client(mutual.url, **mine, retries=0, timeout=60) as client,
        pytest.raises(AccessDenied, match="ca_file"),
    ):
        client.embed(PHOTO)


@pytest.mark.parametrize("name", ["", "expired", "strange", "self_signed"])
def test_certificates_that_it_does_not_trust(
    mutual: Server, certificates: Certificates, name: str
) -> None:
    mine = getattr(certificates, name).client if name else {}
    with (
        Client(mutual.url, ca_file=certificates.ca, **mine, retries=0, timeout=60) as client,
        pytest.raises(Unavailable, match="client certificate"),
    ):
        client.embed(PHOTO)


def test_plain_text_is_refused(mutual: Server) -> None:
    with (
        Client(mutual.url.removeprefix("grpcs://"), retries=0, timeout=60) as client,
        pytest.raises(Unavailable, match="does it want TLS"),
    ):
        client.embed(PHOTO)


def test_old_tls_is_refused(mutual: Server) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    port = int(mutual.url.rpartition(":")[2])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as connection,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(connection)


def test_with_tls_http_stays_on_this_machine(
    tiny_repository: Path, certificates: Certificates
) -> None:
    """Only gRPC listens on another address (here 127.0.0.2), because HTTP has no TLS."""
    with serving(tiny_repository, "--host", "127.0.0.2", *certificates.good.server) as server:
        assert server.url.startswith("grpcs://127.0.0.2:")
        port = int(server.url.rpartition(":")[2])
        assert (port, "127.0.0.2") in listening(server.process.pid)
        http_port = int(server.http_url.rpartition(":")[2])
        assert [a for p, a in listening(server.process.pid) if p == http_port] == ["127.0.0.1"]


@pytest.mark.parametrize("kind", ["missing", "not PEM", "of another", "no key", "client CA"])
def test_tls_files_that_do_not_work_are_told(
    tiny_repository: Path, certificates: Certificates, tmp_path: Path, kind: str
) -> None:
    good, other = certificates.good, certificates.strange
    junk = tmp_path / "junk.pem"
    junk.write_text("not a certificate")
    arguments = {
        "missing": replace(good, key=tmp_path / "missing.key").server,
        "not PEM": replace(good, certificate=junk).server,
        "of another": Pair(good.certificate, other.key).server,
        "no key": good.server[:2],
        "client CA": [*good.server, "--tls-client-ca", str(junk)],
    }[kind]
    command = [BIN / "vit-server", "--model-repository", tiny_repository, *FREE_PORTS, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode in (1, 2)
    assert "--tls-" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


# -- restricted calls --------------------------------------------------------------------------


def refused(server: Server, call: str, headers: dict[str, str]) -> str:
    """The server's error for a gRPC call that must not be allowed."""
    calls: dict[str, Any] = {
        "shared memory": lambda c: c.register_system_shared_memory("x", "/x", 64, headers=headers),
        "shared memory status": lambda c: c.get_system_shared_memory_status(headers=headers),
        "index": lambda c: c.get_model_repository_index(headers=headers),
        "load": lambda c: c.load_model("embed", headers=headers),
        "load a file": lambda c: c.load_model(
            "mine", headers=headers, config="{}", files={"file:1/model.py": b"import os"}
        ),
        "unload": lambda c: c.unload_model("embed", headers=headers),
        "trace": lambda c: c.update_trace_settings(settings={"trace_file": "x"}, headers=headers),
        "log": lambda c: c.update_log_settings({"log_file": "/tmp/x"}, headers=headers),
    }
    with (
        InferenceServerClient(server.url) as client,
        pytest.raises(InferenceServerException) as caught,
    ):
        calls[call](client)
    return str(caught.value.message())


CLOSED = ["shared memory", "shared memory status", "index", "load", "load a file", "unload"]


@pytest.mark.parametrize("call", [*CLOSED, "trace", "log"])
@pytest.mark.parametrize("headers", [{}, {"triton-grpc-protocol-closed": "guessed"}])
def test_grpc_apis_that_are_closed(tiny_server: Server, call: str, headers: dict[str, str]) -> None:
    assert "restricted" in refused(tiny_server, call, headers)


@pytest.mark.parametrize("call", ["load", "load a file", "unload"])
def test_nobody_controls_models_even_with_the_key(tiny_server: Server, call: str) -> None:
    """Any user of this machine can read the key in tritonserver's arguments."""
    pid = tritonserver(tiny_server.process.pid)
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    (option,) = (word for word in words if word.startswith("--grpc-restricted-protocol"))
    key, _, value = option.rpartition(":")[2].partition("=")
    headers = {f"triton-grpc-protocol-{key}": value}
    assert "not allowed" in refused(tiny_server, call, headers)
    with Client(tiny_server.url) as client:
        assert client.health().answering


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("systemsharedmemory/region/x/register", {"key": "/x", "offset": 0, "byte_size": 64}),
        ("systemsharedmemory/status", None),
        ("cudasharedmemory/status", None),
        ("repository/index", {}),
        ("repository/models/embed/load", {}),
        ("repository/models/embed/unload", {}),
        ("trace/setting", {"trace_file": "x"}),
        ("logging", {"log_file": "/tmp/x"}),
    ],
)
def test_http_apis_that_are_closed(
    tiny_server: Server, path: str, body: dict[str, Any] | None
) -> None:
    data = None if body is None else json.dumps(body).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{tiny_server.http_url}/v2/{path}", data, timeout=60)
    with caught.value as answer:
        assert answer.code == 403, answer.read()


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "file:///etc/passwd", "../vit/1/model.pt", "http://localhost/x.jpg"]
)
def test_a_path_in_a_request_is_not_opened(tiny_server: Server, name: str) -> None:
    with Client(tiny_server.url) as client, pytest.raises(BadImage, match="not an image"):
        client.embed(name.encode())


@pytest.mark.parametrize("name", ["../embed", "embed/../../etc", "/etc", "%2e%2e"])
def test_a_path_for_a_model_is_unknown(tiny_server: Server, name: str) -> None:
    with pytest.raises(InferenceServerException, match="unknown model"):
        tiny_server.infer(name, "image", [PHOTO])
    url = f"{tiny_server.http_url}/v2/models/{urllib.request.quote(name, safe='')}/config"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url, timeout=60)
    with caught.value as answer:
        assert answer.code in (400, 404)


def test_labels_are_text(tmp_path: Path) -> None:
    """Class names that could be taken for paths or commands."""
    names = ["../../../../tmp/owned", "/etc/passwd", "$(touch owned)", "`touch owned`", "a\0b"]
    names += ["{{7*7}}", "%s%n", "<script>", "x" * 100_000, "\u202egnp", "", "; touch owned"]
    model = vit_builder.load(GOLDENS / "tiny.pt")
    settings = vit_builder.Settings(precision="fp32", max_batch_size=4, top_k=12)
    vit_builder.build(replace(model, labels=names), settings, tmp_path / "models")
    with serving(tmp_path / "models") as server, Client(server.url) as client:
        found = client.classify(PHOTO, top_k=12)
    assert {(p.index, p.label) for p in found} == set(enumerate(names))
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_names_in_an_archive_are_not_paths(tmp_path: Path) -> None:
    """A .pt file is a zip archive; none of its members is written to disk."""
    evil = tmp_path / "inner" / "evil.pt"
    evil.parent.mkdir()
    with (
        zipfile.ZipFile(GOLDENS / "tiny.pt") as good,
        zipfile.ZipFile(evil, "w", zipfile.ZIP_STORED) as archive,
    ):
        for entry in good.infolist():
            archive.writestr(entry, good.read(entry))
        for name in ("../owned", f"{tmp_path}/owned", "../../../../../../tmp/owned-by-zip"):
            archive.writestr(name, "owned")
    with contextlib.suppress(vit_builder.CheckpointError):
        vit_builder.load(evil)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.pt", "inner"]
    assert not Path("/tmp/owned-by-zip").exists()


def test_the_sdk_sends_no_file_that_was_not_asked_for(tiny_server: Server, tmp_path: Path) -> None:
    """A file that the caller names is read; a path inside it is not followed."""
    svg = tmp_path / "link.svg"
    svg.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{PHOTOS}/coffee.jpg"/></svg>'
    )
    with (
        Client(tiny_server.url) as client,
        pytest.raises(VitClientError, match="that are SVG: not supp"),
    ):
        client.embed(svg)
