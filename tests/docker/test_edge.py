"""docker/edge: who may ask, for what, how much, and what is recorded of it."""

import contextlib
import functools
import http.client
import http.server
import io
import json
import os
import re
import shutil
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import vit_builder
import yaml
from conftest import BIN, GOLDENS, PHOTOS, Server, serving
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from PIL import Image
from prometheus import MONITORING, prometheus
from tritonclient.grpc import service_pb2 as pb
from vit_client import (
    AccessDenied,
    BadImage,
    Client,
    Overloaded,
    VitClientError,
    _inference,
)

from bench.edge import edge
from bench.edge.edge import EDGE, Edge

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
SERVICE = "inference.GRPCInferenceService"
ENSEMBLES = ("classify", "probabilities", "embed", "features", "analyze", "everything")
SMALL = 10  # requests that the tenant `small` may send at once; one more each second


def quotas(routes: str) -> str:
    """routes.yaml with its example for one tenant in use, and enough for all others."""
    used = re.sub(r"# (?=- entries: .* value: acme|  token_bucket: .* 2000)", "", routes)
    assert used != routes
    one, others = "max_tokens: 2000, tokens_per_fill: 1000", "max_tokens: 200, tokens_per_fill: 100"
    assert one in used
    assert others in used
    return (
        used.replace("value: acme", "value: small")
        .replace(one, f"max_tokens: {SMALL}, tokens_per_fill: 1")
        .replace(others, "max_tokens: 100000, tokens_per_fill: 100000")
    )


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another build of the tiny model: its answers have another version."""
    folder = tmp_path_factory.mktemp("canary") / "models"
    settings = vit_builder.Settings(precision="fp32", max_batch_size=16, top_k=5)
    vit_builder.build(vit_builder.load(GOLDENS / "tiny.pt"), settings, folder)
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def door(
    tiny_server: Server, canary: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Edge]:
    servers = {
        "vit": [tiny_server.url],
        "vit-http": [tiny_server.http_url.removeprefix("http://")],
        "vit-canary": [canary.url],
        "vit-canary-http": [canary.http_url.removeprefix("http://")],
    }
    with edge.running(
        tmp_path_factory.mktemp("edge"), servers, edit={"routes.yaml": quotas}
    ) as running:
        yield running


def classify(door: Edge, **options: Any) -> str:
    with Client(door.url, **door.client(**{"retries": 0, **options})) as client:
        return client.classify(PHOTO)[0].label


def call(
    door: Edge, method: str, message: bytes, metadata: tuple[tuple[str, str], ...] = (), **how: Any
) -> grpc.StatusCode:
    """Send bytes as a message, with a valid token; the status."""
    credentials = grpc.ssl_channel_credentials(door.certificates.ca_file.read_bytes())
    options = [("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(door.url.removeprefix("grpcs://"), credentials, options) as channel:
        ask = channel.unary_unary(f"/{method}", bytes, bytes)
        token = (("authorization", f"Bearer {door.tenants.token()}"),)
        try:
            ask(message, timeout=60, metadata=metadata or token, **how)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def request(model: str, photo: bytes = PHOTO) -> bytes:
    message = pb.ModelInferRequest(model_name=model)
    message.inputs.add(name="image", datatype="BYTES", shape=[1, 1])
    message.raw_input_contents.append(struct.pack("<I", len(photo)) + photo)
    return bytes(message.SerializeToString())


def over_http(
    door: Edge, path: str, body: bytes | None = None, token: str = "", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    context = ssl.create_default_context(cafile=door.certificates.ca_file)
    address = door.http_url.removeprefix("https://")
    if token:
        headers["authorization"] = f"Bearer {token}"
    connection = http.client.HTTPSConnection(address, context=context, timeout=60)
    try:
        connection.request("POST" if body else "GET", path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


# -- who ---------------------------------------------------------------------------------------


def test_a_good_token_is_answered_as_without_an_edge(door: Edge, tiny_server: Server) -> None:
    with Client(tiny_server.url) as direct, Client(door.url, **door.client()) as client:
        assert (client.embed(PHOTO) == direct.embed(PHOTO)).all()
        assert client.classify(PHOTO) == direct.classify(PHOTO)
        assert client.model() == direct.model()


def test_tokens_that_are_refused(door: Edge) -> None:
    forged = edge.Tenants().token()  # by another key, under the same name
    hour = 3600
    refused = {
        "Jwt is missing": None,
        "Jwt verification fails": forged,
        "Jwt is expired": door.tenants.token(exp=int(time.time()) - hour),
        "Audiences in Jwt are not allowed": door.tenants.token(aud="another service"),
        "Jwt issuer is not configured": door.tenants.token(iss="https://evil.example/"),
        "the token names no tenant": door.tenants.token(tenant=None),
        "Jwt is not in the form": "what is this",
    }
    for reason, token in refused.items():
        with pytest.raises(AccessDenied, match=reason):
            classify(door, token=token)
    never = door.tenants.token(exp=None)
    with pytest.raises(AccessDenied):
        classify(door, token=never)


def test_a_client_certificate_instead_of_a_token(door: Edge, tmp_path: Path) -> None:
    mine = door.certificates.issue(tmp_path / "mine", "acme.example", common_name="acme")
    assert classify(door, token=None, **mine)
    logged(door, lambda call: (call["tenant"] or "").startswith("CN=acme"))
    others = edge.Certificates(tmp_path / "others")  # of a CA that the edge does not know
    theirs = others.issue(tmp_path / "theirs", "acme.example")
    with pytest.raises(Exception, match=r"TLS|certificate|handshake") as caught:
        classify(door, token=None, **theirs)
    assert not isinstance(caught.value, AssertionError)


def test_a_certificate_that_is_revoked(tiny_server: Server, tmp_path: Path) -> None:
    """With what is commented out in client-ca.yaml."""
    edit = {"client-ca.yaml": lambda text: uncommented(text, "crl:")}
    list_of = tmp_path / "tls" / "ca.crl"
    with edge.running(tmp_path, {"vit": [tiny_server.url]}, edit=edit) as door:
        good = door.certificates.issue(tmp_path / "good", "acme.example", common_name="good")
        assert classify(door, token=None, **good)
        bad = door.certificates.issue(tmp_path / "bad", "acme.example", common_name="bad")
        new = list_of.with_suffix(".new")
        new.write_bytes(door.certificates.revoking(bad["cert_file"]))
        new.rename(list_of)
        until(lambda: not admitted(door, bad))
        assert classify(door, token=None, **good)


def admitted(door: Edge, files: dict[str, Path]) -> bool:
    try:
        return bool(classify(door, token=None, **files))
    except VitClientError:
        return False


@pytest.mark.parametrize("header", ["vit-tenant", "vit-certificate"])
def test_callers_cannot_set_who_they_are(door: Edge, header: str) -> None:
    message, metadata = request("classify"), ((header, "acme"),)
    assert call(door, f"{SERVICE}/ModelInfer", message, metadata) is grpc.StatusCode.UNAUTHENTICATED


def test_health_is_open(door: Edge) -> None:
    metadata = (("nothing", "to-show"),)
    for method in ("ServerLive", "ServerReady", "ServerMetadata"):
        assert call(door, f"{SERVICE}/{method}", b"", metadata) is grpc.StatusCode.OK
    assert call(door, "grpc.health.v1.Health/Check", b"", metadata) is grpc.StatusCode.OK
    assert over_http(door, "/v2/health/ready")[0] == 200
    assert over_http(door, "/v2/health/live")[0] == 200


def test_keys_are_rotated_without_a_restart(tiny_server: Server, tmp_path: Path) -> None:
    tenants = edge.Tenants()
    with edge.running(tmp_path, {"vit": [tiny_server.url]}, tenants=tenants) as door:
        old = tenants.token()
        tenants.add_key("second")
        new = tenants.token(key="second")
        assert classify(door, token=old)
        with pytest.raises(AccessDenied, match="Jwks doesn't have key"):
            classify(door, token=new)
        door.rewrite("login.yaml", edge.login(tenants))  # both are good for a while
        until(lambda: accepted(door, new))
        assert accepted(door, old)
        del tenants.keys["first"]
        door.rewrite("login.yaml", edge.login(tenants))
        until(lambda: not accepted(door, old))
        assert accepted(door, new)


def test_keys_that_the_login_service_publishes(tiny_server: Server, tmp_path: Path) -> None:
    """With what is commented out in login.yaml and envoy.yaml."""
    tenants = edge.Tenants()
    with published(tenants, tmp_path / "login") as (port, ca_file):

        def remote(text: str) -> str:
            local = text.index("          local_jwks:")
            rest = text.index("          # Or where", local)
            return uncommented(text[:local] + text[rest:], "remote_jwks:")

        def cluster(text: str) -> str:
            text = uncommented(text, "- name: login")
            return text.replace("/etc/ssl/certs/ca-certificates.crt", str(ca_file))

        edit = {"login.yaml": remote, "envoy.yaml": cluster}
        servers = {"vit": [tiny_server.url], "login": [f"127.0.0.1:{port}"]}
        with edge.running(tmp_path, servers, tenants=tenants, edit=edit) as door:
            until(lambda: accepted(door, tenants.token()))
            assert not accepted(door, edge.Tenants().token())


def uncommented(text: str, first: str) -> str:
    """With the comment that begins with this line as the configuration that it is."""
    found = re.search(rf"^( *)# {re.escape(first)}.*\n(\1#   .*\n)*", text, re.MULTILINE)
    assert found
    return text.replace(found[0], found[0].replace("# ", ""))


@contextlib.contextmanager
def published(tenants: edge.Tenants, folder: Path) -> Iterator[tuple[int, Path]]:
    """The keys over HTTPS, as login.example.com: the port, and the CA to trust."""
    certificates = edge.Certificates(folder)
    files = certificates.issue(folder / "login", "login.example.com")
    (folder / "jwks.json").write_text(tenants.jwks())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["cert_file"], files["key_file"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], certificates.ca_file
        server.shutdown()


def test_as_shipped_nobody_is_admitted(tiny_server: Server, tmp_path: Path) -> None:
    """There are no keys in login.yaml yet."""
    shipped = {"login.yaml": lambda text: text}
    with edge.running(tmp_path, {"vit": [tiny_server.url]}, edit=shipped) as door:
        assert call(door, f"{SERVICE}/ModelInfer", request("classify")) is not grpc.StatusCode.OK
        spoofed = (("vit-certificate", "acme"),)
        sent = request("classify")
        assert call(door, f"{SERVICE}/ModelInfer", sent, spoofed) is not grpc.StatusCode.OK
        log = (door.folder / "log").read_text()
        assert "Jwks doesn't have any valid public key" in log


def test_a_renewed_certificate_is_taken_without_a_restart(
    tiny_server: Server, tmp_path: Path
) -> None:
    with edge.running(tmp_path, {"vit": [tiny_server.url]}) as door:
        address = door.url.removeprefix("grpcs://").rsplit(":", 1)

        def served() -> str:
            return ssl.get_server_certificate((address[0], int(address[1])))

        before = served()
        renewed = tmp_path / "new"
        files = door.certificates.issue(renewed, "127.0.0.1")
        files["key_file"].rename(door.folder / "tls" / "tls.key")
        files["cert_file"].rename(door.folder / "tls" / "tls.crt")
        until(lambda: served() != before)
        assert classify(door)


def accepted(door: Edge, token: str) -> bool:
    try:
        return bool(classify(door, token=token))
    except AccessDenied:
        return False


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# -- which calls and models --------------------------------------------------------------------


def test_every_ensemble_and_its_description_are_open(door: Edge) -> None:
    for model in ENSEMBLES:
        assert call(door, f"{SERVICE}/ModelInfer", request(model)) is grpc.StatusCode.OK
        for method in ("ModelConfig", "ModelMetadata", "ModelReady"):
            message = getattr(pb, f"{method}Request")(name=model).SerializeToString()
            assert call(door, f"{SERVICE}/{method}", message) is grpc.StatusCode.OK


@pytest.mark.parametrize("model", ["vit", "preprocess", "postprocess", "", "classify ", "nothing"])
def test_no_other_model_is_reached(door: Edge, model: str) -> None:
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert call(door, f"{SERVICE}/ModelInfer", request(model)) is denied
    for method in ("ModelConfig", "ModelMetadata", "ModelReady"):
        if (method, model) == ("ModelConfig", "vit"):
            continue  # the SDK reads there what is served
        message = getattr(pb, f"{method}Request")(name=model).SerializeToString()
        assert call(door, f"{SERVICE}/{method}", message) is denied


def test_a_name_that_is_there_twice(door: Edge) -> None:
    """Protocol buffers take the last one; so does what looks for it in the message."""
    vit, good = pb.ModelInferRequest(model_name="vit").SerializeToString(), request("classify")
    overlong = b"\x8a\x00\x03vit"  # the same field, its number in one byte more than it needs
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert call(door, f"{SERVICE}/ModelInfer", vit + good) is grpc.StatusCode.OK
    assert call(door, f"{SERVICE}/ModelInfer", good + vit) is denied
    assert call(door, f"{SERVICE}/ModelInfer", good + overlong) is denied


def test_messages_that_cannot_be_read_are_refused(door: Edge, tiny_server: Server) -> None:
    before = asked(tiny_server)
    method = f"{SERVICE}/ModelInfer"
    compressed = call(door, method, request("classify"), compression=grpc.Compression.Gzip)
    assert compressed is grpc.StatusCode.INVALID_ARGUMENT
    for message in (b"", b"\xff\xff\xff", request("classify")[:-1][5:]):
        assert call(door, method, message) is not grpc.StatusCode.OK
    assert asked(tiny_server) == before


@pytest.mark.parametrize(
    "method",
    [
        "ModelStreamInfer",
        "RepositoryIndex",
        "RepositoryModelUnload",
        "SystemSharedMemoryStatus",
        "TraceSetting",
        "LogSettings",
        "ModelStatistics",
    ],
)
def test_no_other_call_is_open(door: Edge, method: str) -> None:
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert call(door, f"{SERVICE}/{method}", b"") is denied
    assert call(door, f"{SERVICE}/{method}", request("classify")) is denied


def test_65_rows_for_the_network_never_arrive(door: Edge, tiny_server: Server) -> None:
    """Such a request would fail the others in its batch."""
    before = asked(tiny_server)
    message = pb.ModelInferRequest(model_name="vit")
    message.inputs.add(name="pixels", datatype="UINT8", shape=[65, 64, 64, 3])
    message.raw_input_contents.append(bytes(65 * 64 * 64 * 3))
    sent = message.SerializeToString()
    assert call(door, f"{SERVICE}/ModelInfer", sent) is grpc.StatusCode.PERMISSION_DENIED
    assert asked(tiny_server) == before


def asked(server: Server) -> dict[str, int]:
    """Requests that each model has got, whether it answered them or not."""
    with grpc.insecure_channel(server.url) as channel:
        ask = channel.unary_unary(
            f"/{SERVICE}/ModelStatistics", bytes, pb.ModelStatisticsResponse.FromString
        )
        found = ask(b"", timeout=60).model_stats
    count: Counter[str] = Counter()
    for model in found:
        count[model.name] += model.inference_stats.success.count + model.inference_stats.fail.count
    return dict(count)


# -- how much ----------------------------------------------------------------------------------


def test_a_quota_is_one_tenants_own(door: Edge) -> None:
    started = time.monotonic()
    with Client(door.url, **door.client("small", retries=0)) as small:
        many(small, SMALL - 1)  # it has asked for the model's configuration, too
        with pytest.raises(Overloaded, match="this tenant's quota is used up") as caught:
            many(small, 10 * SMALL)
        assert caught.value.retry_after == 1
        assert over_http(door, "/v2/health/ready", token=door.tenants.token("small"))[0] == 200
    with Client(door.url, **door.client("large", retries=0)) as large:
        many(large, 3 * SMALL)
    with Client(door.url, **door.client("small")) as patient:  # retries when it is told to
        assert patient.classify(PHOTO)
    assert time.monotonic() - started > 1


def many(client: Client, count: int) -> None:
    for _ in range(count):
        client.classify(PHOTO)


def test_requests_under_way_are_bounded(tiny_server: Server, tmp_path: Path) -> None:
    def bound(config: Any) -> None:
        thresholds, _ = edge.clusters(config)["vit"]["circuit_breakers"]["thresholds"]
        assert thresholds["max_requests"] == 1024
        thresholds["max_requests"] = 1

    servers = {"vit": [tiny_server.url]}
    with (
        edge.running(tmp_path, servers, change=bound, edit={"routes.yaml": quotas}) as door,
        Client(door.url, **door.client(retries=0)) as client,
    ):
        many(client, 2)
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(client.classify, PHOTO) for _ in range(64)]
            errors = [call.exception() for call in calls]
        assert {type(error) for error in errors} == {type(None), Overloaded}
        refused = next(error for error in errors if isinstance(error, Overloaded))
        assert "too many or too large requests are under way" in str(refused)
        assert refused.retry_after == 1


def test_messages_of_more_than_64_mib_are_refused(door: Edge) -> None:
    for size, status in (
        (63, grpc.StatusCode.INVALID_ARGUMENT),
        (65, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ):
        message = request("classify", bytes(size << 20))  # which is no image
        assert call(door, f"{SERVICE}/ModelInfer", message) is status


def test_many_large_messages_at_once_do_not_take_its_memory(door: Edge) -> None:
    message = request("classify", bytes(60 << 20))

    def ask(_: int) -> grpc.StatusCode:
        return call(door, f"{SERVICE}/ModelInfer", message)

    limit = 768 << 20  # envoy.yaml's
    envoy, most = psutil.Process(door.process.pid), 0
    with ThreadPoolExecutor(24) as pool:
        calls = [pool.submit(ask, number) for number in range(48)]
        while not all(call.done() for call in calls):
            most = max(most, envoy.memory_info().rss)
            assert door.ready()  # or it would be taken out of a Service, and the next one be hit
    codes = Counter(call.result() for call in calls)
    print(codes, most >> 20)
    refused = {grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert set(codes) <= {grpc.StatusCode.INVALID_ARGUMENT, *refused}  # the first: it is no image
    assert codes.keys() & refused
    assert most < limit + (200 << 20)
    until(lambda: answers(door))


def answers(door: Edge) -> bool:
    try:
        return bool(classify(door))
    except Overloaded:
        return False


def test_the_sdk_splits_what_is_too_large_for_the_edge(tiny_server: Server, tmp_path: Path) -> None:
    def small(routes: str) -> str:
        limit = f"request_body_buffer_limit: {64 << 20}"
        assert limit in routes
        return routes.replace(limit, f"request_body_buffer_limit: {1 << 20}")

    photo = io.BytesIO()
    Image.effect_noise((512, 512), 100).save(photo, "BMP")  # 0.26 MB
    with (
        edge.running(tmp_path, {"vit": [tiny_server.url]}, edit={"routes.yaml": small}) as door,
        Client(tiny_server.url) as direct,
        Client(door.url, **door.client()) as client,
    ):
        photos = [photo.getvalue(), PHOTO] * 8
        assert client.classify(photos) == direct.classify(photos)
        with pytest.raises(BadImage, match=r"2.0 MiB, too large .*larger than max"):
            client.classify(bytes(2 << 20))


@pytest.mark.parametrize("path", ["/v2/models/classify/infer", "/v2/models/classify/config"])
@pytest.mark.parametrize("query", ["", "?", "?x=1", "?/v2/health/ready"])
def test_no_path_is_without_a_quota(door: Edge, path: str, query: str) -> None:
    tenant, headers = "small", {"Inference-Header-Content-Length": "0"}
    body = b"no image" if path.endswith("infer") else None
    statuses = Counter(
        over_http(door, path + query, body, door.tenants.token(tenant), **headers)[0]
        for _ in range(2 * SMALL)
    )
    assert statuses[429] >= SMALL - 2  # it gets one more each second


def test_a_tenant_is_shut_out(door: Edge) -> None:
    """With the second example of routes.yaml."""
    routes = quotas((EDGE / "routes.yaml").read_text())
    shut = re.sub(r"# (?=- entries: .* value: evil|  token_bucket: .* 86400s)", "", routes)
    assert shut.count("#") == routes.count("#") - 2
    door.rewrite("routes.yaml", shut)
    try:
        until(lambda: not answered_as(door, "evil"))
        assert not any(answered_as(door, "evil") for _ in range(20))
        assert answered_as(door, "good")
    finally:
        door.rewrite("routes.yaml", routes)
    until(lambda: answered_as(door, "evil"))


def answered_as(door: Edge, tenant: str) -> bool:
    token = door.tenants.token(tenant)
    return over_http(door, "/v2/models/classify/config", token=token)[0] == 200


def test_streams_without_a_login_take_no_place(door: Edge) -> None:
    """Health needs none: 300 calls that are begun and never sent, and messages of 10 MB."""
    credentials = grpc.ssl_channel_credentials(door.certificates.ca_file.read_bytes())
    ended = threading.Event()

    def never() -> Iterator[bytes]:
        ended.wait(60)
        yield b""

    with grpc.secure_channel(door.url.removeprefix("grpcs://"), credentials) as channel:
        for name in ("Check", "Check", "Check"):
            ask = channel.stream_unary(f"/grpc.health.v1.Health/{name}", bytes, bytes)
            calls = [ask.future(never()) for _ in range(100)]
        with Client(door.url, **door.client(retries=0)) as client:
            many(client, 20)
        ended.set()
        del calls
    for method in ("grpc.health.v1.Health/Check", f"{SERVICE}/ServerMetadata"):
        code = call(door, method, bytes(10 << 20), (("no", "token"),))
        assert code is not grpc.StatusCode.OK


def test_names_that_callers_make_up_stay_out_of_metrics_and_log(door: Edge) -> None:
    before, logged_before = door.metrics().count("\n"), (door.folder / "log").stat().st_size
    for number in range(20):
        name = f"{number}-" + "x" * 100_000
        denied = grpc.StatusCode.PERMISSION_DENIED
        assert call(door, f"{SERVICE}/ModelInfer", request(name)) is denied
        path = f"/v2/models/{name[:2000]}/infer"
        assert over_http(door, path, PHOTO, door.tenants.token())[0] in (403, 404)
        secret = door.tenants.token()
        assert over_http(door, f"/v2/models/classify/config?access_token={secret}")[0] == 401
    time.sleep(1)
    assert "xxx" not in door.metrics()
    assert door.metrics().count("\n") < before + 200
    log = (door.folder / "log").read_text()
    assert len(log) - logged_before < 60 * 2000
    assert secret not in log


# -- which version -----------------------------------------------------------------------------


def answered(door: Edge, calls: int, metadata: tuple[tuple[str, str], ...]) -> list[str]:
    """The model version of each answer."""
    small = io.BytesIO()
    Image.new("RGB", (16, 16)).save(small, "PNG")
    message = request("classify", small.getvalue())
    credentials = grpc.ssl_channel_credentials(door.certificates.ca_file.read_bytes())
    with grpc.secure_channel(door.url.removeprefix("grpcs://"), credentials) as channel:
        ask = channel.unary_unary(f"/{SERVICE}/ModelInfer", bytes, pb.ModelInferResponse.FromString)
        said = (("authorization", f"Bearer {door.tenants.token()}"), *metadata)
        with ThreadPoolExecutor(8) as pool:
            return [
                answer.model_version
                for answer in pool.map(lambda _: ask(message, 60, said), range(calls))
            ]


def test_a_share_goes_to_the_canary_and_back(
    door: Edge, tiny_server: Server, canary: Server
) -> None:
    versions = {}
    for name, server in (("stable", tiny_server), ("canary", canary)):
        with Client(server.url) as direct:
            versions[direct.model().version] = name

    def shares(calls: int, *metadata: tuple[str, str]) -> Counter[str]:
        return Counter(versions[version] for version in answered(door, calls, metadata))

    assert shares(50) == {"stable": 50}
    assert shares(50, ("vit-canary", "true")) == {"canary": 50}
    routes = quotas((EDGE / "routes.yaml").read_text())
    split = routes.replace("&stable 100", "&stable 90").replace("&canary 0", "&canary 10")
    assert split != routes
    door.rewrite("routes.yaml", split)
    try:
        until(lambda: shares(50)["canary"])
        # 200 of 2,000, give or take five standard deviations.
        assert abs(shares(2000)["canary"] - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
        # The rest of a list is asked of whoever answered the most.
        with Client(door.url, **door.client()) as client:
            assert len(client.classify([PHOTO] * 64)) == 64
    finally:
        door.rewrite("routes.yaml", routes)
    until(lambda: shares(50) == {"stable": 50})
    assert shares(500) == {"stable": 500}


# -- a record ----------------------------------------------------------------------------------


def logged(door: Edge, fits: Any) -> dict[str, Any]:
    """The last line of the access log that fits; it may be a moment late."""
    found: list[dict[str, Any]] = []
    until(lambda: found.extend(line for line in door.log() if fits(line)) or found, 20)
    return found[-1]


def test_one_line_a_call(door: Edge, tiny_server: Server) -> None:
    token = door.tenants.token("recorded")
    with Client(door.url, **door.client(token=token)) as client:
        client.embed(PHOTO)
        with pytest.raises(BadImage) as caught:
            client.embed(b"no image")
    good = ("recorded", "embed", "OK")
    line = logged(door, lambda call: (call["tenant"], call["model"], call["grpc_status"]) == good)
    assert line["model"] == "embed"
    assert line["path"] == f"/{SERVICE}/ModelInfer"
    assert line["grpc_status"] == "OK"
    assert line["upstream"] == tiny_server.url
    assert line["bytes_received"] > len(PHOTO)
    assert line["bytes_sent"] > 64 * 4
    assert line["duration_ms"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    refused = ("recorded", "InvalidArgument")
    bad = logged(door, lambda call: (call["tenant"], call["grpc_status"]) == refused)
    assert bad["vit_request_id"] == caught.value.request_id
    log = (door.folder / "log").read_text()
    assert token.rpartition(".")[2] not in log


def test_the_caller_of_http_has_its_line_too(door: Edge) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    path = "/v2/models/classify/infer"
    headers = {"Inference-Header-Content-Length": "0", "traceparent": trace}
    status, found, body = over_http(door, path, PHOTO, door.tenants.token("web"), **headers)
    assert status == 200
    assert b'"model_name":"classify"' in body
    line = logged(door, lambda call: call["request_id"] == found["x-request-id"])
    assert (line["tenant"], line["path"], line["status"]) == ("web", path, 200)
    assert line["traceparent"] == trace
    assert line["model"] == "classify"


def test_histograms_by_tenant_and_model(door: Edge) -> None:
    with Client(door.url, **door.client("measured")) as client:
        for _ in range(3):
            client.embed(PHOTO)
    wanted = r'envoy_vit_edge_milliseconds_count\{tenant="measured",model="embed",.*="OK".*\} 3'
    until(lambda: re.search(wanted, door.metrics()), 20)


def test_prometheus_has_its_series(door: Edge, cache: Path, tmp_path: Path) -> None:
    """Those of edge.yaml and of the dashboard."""
    rules = yaml.safe_load((MONITORING / "edge.yaml").read_text())["groups"][0]["rules"]
    panels = json.loads((MONITORING / "grafana" / "vit.json").read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    with (
        prometheus(door.status_url, cache, tmp_path, job="vit-edge") as watching,
        Client(door.url, **door.client("small", retries=0)) as client,
    ):
        watching.wait('up{job="vit-edge"}', lambda value: value == 1)
        watching.wait('envoy_cluster_membership_healthy{envoy_cluster_name="vit"}')
        for _ in range(20):
            for _ in range(2 * SMALL):
                with contextlib.suppress(Overloaded):
                    client.classify(PHOTO)
            time.sleep(0.2)
        ours = [rule["record"] for rule in rules]
        ours += [e.replace("$__rate_interval", "1m") for e in shown if "vit_edge_" in e]
        assert len(ours) == 3 + 4
        for expression in ours:
            watching.wait(expression)
        watching.wait('ALERTS{alertname="VitEdgeQuota", tenant="small", alertstate="pending"}')
        soon = "envoy_listener_ssl_certificate_expiration_unix_time_seconds"
        assert len(watching.wait(soon)) == 2
        others = 'ALERTS{alertname=~"VitEdge.*", alertname!="VitEdgeQuota"}'
        assert not watching.query(others)
        routes = (door.folder / "routes.yaml").read_text()
        door.rewrite("routes.yaml", "resources: [{")
        watching.wait('ALERTS{alertname="VitEdgeConfiguration"}')
        door.rewrite("routes.yaml", routes)
        assert classify(door)


# -- HTTP --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/vit/infer",
        "/v2/models/classify/../vit/infer",
        "/v2/models/classify%2f..%2fvit/infer",
        "/v2/models/classify/infer/../../vit/infer",
        "/v2/models/vit/versions/1/infer",
        "/v2/models/classify/stats",
        "/v2/models/classify/generate",
        "/v2/repository/index",
        "/v2/systemsharedmemory/status",
        "/metrics",
        "/",
    ],
)
def test_nothing_else_over_http(door: Edge, path: str) -> None:
    token = door.tenants.token()
    for body in (None, PHOTO):
        status = over_http(door, path, body, token, **{"Inference-Header-Content-Length": "0"})[0]
        assert status in (400, 403, 404)


def test_http_has_the_same_login_and_quota(door: Edge) -> None:
    path, headers = "/v2/models/classify/infer", {"Inference-Header-Content-Length": "0"}
    assert over_http(door, path, PHOTO, **headers)[0] == 401
    statuses = [
        over_http(door, path, PHOTO, door.tenants.token("small"), **headers)
        for _ in range(2 * SMALL)
    ]
    assert {status for status, _, _ in statuses} <= {200, 429}
    refused = next(found for status, found, _ in statuses if status == 429)
    assert refused["retry-after"] == "1"


# -- the files ---------------------------------------------------------------------------------


def test_the_messages_that_envoy_reads_are_the_sdks() -> None:
    (file,) = FileDescriptorSet.FromString((EDGE / "inference.pb").read_bytes()).file
    assert file.SerializeToString().hex() == _inference.FILE_DESCRIPTOR


def test_the_admin_interface_is_not_for_the_network() -> None:
    config = yaml.safe_load((EDGE / "envoy.yaml").read_text())
    assert config["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


def test_the_readmes_first_try(
    tiny_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificate, keys and token, and its two calls."""
    readme = (EDGE.parent / "README.md").read_text()
    section = readme[readme.index("\n## The edge") : readme.index("\n## Sizing")]
    certificate, calls = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[:2]
    (script,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    docker = tmp_path / "docker"
    (docker / "edge" / "tls").mkdir(parents=True)
    shell(certificate, tmp_path)
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    keys, token = made.stdout.splitlines()

    def ours(text: str) -> str:
        none = """inline_string: '{"keys": []}'"""
        assert none in text
        return text.replace(none, keys)

    (running := tmp_path / "edge").mkdir()
    servers = {
        "vit": [tiny_server.url],
        "vit-http": [tiny_server.http_url.removeprefix("http://")],
    }
    with edge.running(running, servers, edit={"login.yaml": ours}) as door:
        for file in (docker / "edge" / "tls").iterdir():
            shutil.copy(file, running / "tls" / f"{file.name}.new")
        for file in (docker / "edge" / "tls").iterdir():
            (running / "tls" / f"{file.name}.new").rename(running / "tls" / file.name)
        port = door.url.rpartition(":")[2]
        calls = calls.replace("8443", port).replace("VIT_TOKEN=…", f"VIT_TOKEN={token.split()[1]}")
        calls = calls.replace("../photos", str(PHOTOS))
        certificate = (docker / "edge" / "tls" / "tls.crt").read_text()
        until(lambda: ssl.get_server_certificate(("localhost", int(port))) == certificate)
        monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        said = shell(calls, docker)
    assert "dining_area" in said
    answer = (docker / "answer.bin").read_bytes()
    assert answer.startswith(b'{"model_name":"classify"')


def shell(script: str, folder: Path) -> str:
    done = subprocess.run(
        ["sh", "-ec", script], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
