"""The manifests in docker/kubernetes: built, valid, and what they promise about each other."""

import copy
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml
from conftest import BIN, GOLDENS
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from vit_server import gpu, options, probe, process, sizing

from . import rendered
from .rendered import FOLDER, ROOT, VERSIONS, Object, find, quantity

FOLDERS = (
    "overlays/gpu",
    "overlays/cpu",
    "overlays/example",
    "overlays/canary",
    "kserve",
    "kserve/model",
    "load",
)
COMPOSED = (
    ("overlays/gpu", "monitoring", "autoscaling"),
    ("overlays/gpu", "monitoring", "keda"),
    ("overlays/gpu", "tls"),
    ("overlays/gpu", "monitoring", "tracing"),
    ("overlays/cpu", "monitoring", "autoscaling"),
    ("overlays/cpu", "monitoring", "keda"),
    ("overlays/cpu", "tls", "baked"),
    ("overlays/cpu", "tls", "baked", "tracing"),
    ("overlays/gpu", "monitoring", "edge"),
    ("overlays/gpu", "edge", "baked", "tracing"),
    ("overlays/cpu", "monitoring", "edge", "keda"),
    ("overlays/canary", "baked"),
    ("overlays/gpu", "gateway"),
    ("kserve", "monitoring"),
)
# Made by hand, see docker/README.md.
SECRETS = {"vit-admin-key", "vit-tls", "vit-edge-tls"}
MIB = 2**20


@pytest.fixture(scope="module", params=[*FOLDERS, *COMPOSED], ids=str)
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if isinstance(request.param, str):
        return rendered.kustomize(FOLDER / request.param)
    return rendered.composed(tmp_path_factory.mktemp("overlay"), *request.param)


@pytest.fixture(params=["overlays/gpu", "overlays/cpu", "overlays/example", "kserve"])
def deployed(request: pytest.FixtureRequest) -> list[Object]:
    return rendered.kustomize(FOLDER / request.param)


def test_every_folder_is_tested() -> None:
    found = {str(f.parent.relative_to(FOLDER)) for f in FOLDER.rglob("kustomization.yaml")}
    used = {f"components/{name}" for _, *names in COMPOSED for name in names}
    assert found == {*FOLDERS, *used, "base"}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(objects: list[Object], version: str) -> None:
    for thing in objects:
        rendered.validate(thing, version)


def test_validation_is_strict(tmp_path: Path) -> None:
    """Of built-in and of custom objects: the test above can fail."""
    example = rendered.kustomize(FOLDER / "overlays/example")
    kserve = rendered.kustomize(FOLDER / "kserve")
    gateway = rendered.composed(tmp_path, "overlays/gpu", "gateway")
    for objects, kind, name, path in (
        (example, "Deployment", "vit", ("spec", "template", "spec")),
        (example, "ServiceMonitor", "vit", ("spec", "endpoints", 0)),
        (example, "PrometheusRule", "vit", ("spec", "groups", 0, "rules", 0)),
        (kserve, "ServingRuntime", "vit-triton", ("spec", "containers", 0)),
        (kserve, "InferenceService", "vit", ("spec", "predictor", "model")),
        (gateway, "GRPCRoute", "vit", ("spec", "rules", 0, "matches", 0, "method")),
    ):
        broken = copy.deepcopy(find(objects, kind, name))
        place: Any = broken
        for step in path:
            place = place[step]
        place["noSuchField"] = 1
        with pytest.raises(jsonschema.ValidationError, match="noSuchField"):
            rendered.validate(broken)


def test_pods_have_no_rights(objects: list[Object]) -> None:
    for name, pod in rendered.pods(objects):
        assert pod["automountServiceAccountToken"] is False, name
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True, name
        user = 65532 if name == "Deployment vit-edge" else 1000  # as in the image of each
        assert (context["runAsUser"], context["runAsGroup"]) == (user, user), name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in rendered.containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert "memory" in container["resources"]["limits"], name


def test_what_is_mounted_and_named_exists(objects: list[Object]) -> None:
    for name, pod in rendered.pods(objects):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {m["name"] for c in rendered.containers(pod) for m in c["volumeMounts"]}
        assert mounts == set(volumes), name
        sources = [s for v in volumes.values() for s in v.get("projected", {}).get("sources", [v])]
        for source in sources:
            if "configMap" in source:
                find(objects, "ConfigMap", source["configMap"]["name"])
        wanted = {s["secret"]["secretName"] for s in sources if "secret" in s}
        for container in rendered.containers(pod):
            values = [e.get("valueFrom", {}) for e in container.get("env", [])]
            wanted |= {v["secretKeyRef"]["name"] for v in values if "secretKeyRef" in v}
        assert wanted <= SECRETS, name


def test_images_are_placeholders_or_public(objects: list[Object]) -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    public = (
        "nvcr.io/nvidia/tritonserver:26.09-",
        compose["services"]["collector"]["image"],
        "envoyproxy/envoy:distroless-v",  # test_edge.py compares the version
    )
    for name, pod in rendered.pods(objects):
        for container in rendered.containers(pod):
            assert container["image"].startswith(("registry.example.com/", *public)), name


@pytest.mark.parametrize("overlay", ["gpu", "cpu", "example"])
def test_selectors_find_the_pods(overlay: str) -> None:
    objects = rendered.kustomize(FOLDER / "overlays" / overlay)
    kinds = {"Service", "PodDisruptionBudget", "NetworkPolicy"}
    selecting = [o["spec"] for o in objects if o["kind"] in kinds]
    assert len(selecting) == 4
    deployment = find(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    ports = {p["name"] for p in deployment["template"]["spec"]["containers"][0]["ports"]}
    spread = deployment["template"]["spec"]["topologySpreadConstraints"]
    selectors = [c["labelSelector"] for c in spread]
    selectors += [deployment["selector"]]
    selectors += [s.get("podSelector") or s["selector"] for s in selecting]
    for selector in selectors:
        assert selector.get("matchLabels", selector).items() <= labels.items()
    targets = {p["targetPort"] for s in selecting for p in s.get("ports", [])}
    assert targets <= ports


def test_around_kserve() -> None:
    """KServe gives the pods one label that is known beforehand."""
    objects = rendered.kustomize(FOLDER / "kserve")
    kinds = {"Service", "PodDisruptionBudget", "NetworkPolicy"}
    selecting = {o["kind"]: o["spec"] for o in objects if o["kind"] in kinds}
    name = find(objects, "InferenceService")["metadata"]["name"]
    labels = {"serving.kserve.io/inferenceservice": name}
    assert selecting["NetworkPolicy"]["podSelector"] == {"matchLabels": labels}
    assert selecting["PodDisruptionBudget"]["selector"] == {"matchLabels": labels}
    assert selecting["Service"]["selector"] == labels
    _, container = rendered.server(objects)
    clients, metrics = selecting["NetworkPolicy"]["ingress"]
    assert [p["port"] for p in clients["ports"]] == [p["containerPort"] for p in container["ports"]]
    assert [p["port"] for p in metrics["ports"]] == [8002]


@pytest.mark.parametrize("base", ["overlays/gpu", "overlays/canary", "kserve"])
def test_exactly_one_service_is_scraped(base: str, tmp_path: Path) -> None:
    objects = rendered.composed(tmp_path, "overlays/gpu", "monitoring")
    monitor = find(objects, "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    (names,) = monitor["selector"]["matchExpressions"]
    assert names["operator"] == "In"
    (_,) = (
        service
        for service in rendered.kustomize(FOLDER / base)
        if service["kind"] == "Service"
        and service["metadata"]["labels"].get(names["key"]) in names["values"]
        and endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    )
    # What the rules look for.
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "vit"}]


def test_no_replica_is_missed(deployed: list[Object]) -> None:
    """A rollout or a drained node never takes a pod away before another is there."""
    if any(o["kind"] == "InferenceService" for o in deployed):
        strategy = find(deployed, "InferenceService")["spec"]["predictor"]["deploymentStrategy"]
    else:
        strategy = find(deployed, "Deployment")["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert find(deployed, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_shutdown_fits_into_the_grace_period(deployed: list[Object]) -> None:
    pod, container = rendered.server(deployed)
    assert container["args"][0] == "vit-server"
    asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert asleep >= 10
    stopping = probe.DRAIN_SECONDS + process.EXIT_SECONDS
    assert asleep + stopping + 5 <= pod["terminationGracePeriodSeconds"]


def test_probes(deployed: list[Object]) -> None:
    _, container = rendered.server(deployed)
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    startup = container["startupProbe"]
    if any(a.startswith("--tls") for a in container["args"]):  # HTTP stays on loopback then
        assert startup["exec"]["command"][0] == "python3"
    else:
        assert startup["httpGet"]["path"] == "/v2/health/ready"
        port = startup["httpGet"]["port"]
        assert ports.get(port, port) == 8000
    liveness = container["livenessProbe"]
    assert liveness["exec"]["command"] == ["python3", "/opt/vit/health.py", "--live"]
    assert liveness["timeoutSeconds"] > 40  # health.py waits 10 s for each of four answers
    readiness = container["readinessProbe"]
    assert readiness["exec"]["command"] == ["python3", "/opt/vit/health.py"]
    assert readiness["timeoutSeconds"] > 20  # health.py waits 10 s for each of two answers


def test_threads_come_from_the_cpu_limit(deployed: list[Object]) -> None:
    _, container = rendered.server(deployed)
    (threads,) = (e for e in container["env"] if e["name"] == "OMP_NUM_THREADS")
    assert threads["valueFrom"] == {"resourceFieldRef": {"resource": "limits.cpu"}}
    assert quantity(container["resources"]["limits"]["cpu"]).is_integer()


def test_pods_are_guaranteed(deployed: list[Object]) -> None:
    """Requests are limits, in every container: cores of their own, and the last to be evicted."""
    pod, _ = rendered.server(deployed)
    for container in rendered.containers(pod):
        limits = {k: v for k, v in container["resources"]["limits"].items() if "/" not in k}
        assert container["resources"]["requests"] == limits
        assert set(limits) == {"cpu", "memory", "ephemeral-storage"}


def test_storage_adds_up(deployed: list[Object]) -> None:
    """A pod asks for what its folders on the node's disk may hold, and for its logs."""
    pod, container = rendered.server(deployed)
    folders = [v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v]
    most = sum(quantity(f["sizeLimit"]) for f in folders if f.get("medium") != "Memory")
    for part in rendered.containers(pod):
        asked = quantity(part["resources"]["limits"]["ephemeral-storage"])
        assert asked >= most + (100 * MIB if part is container else 0)


def test_memory_adds_up(deployed: list[Object], tmp_path: Path) -> None:
    """/dev/shm holds a full batch with a large photo in it, and the limit holds all of it."""
    pod, container = rendered.server(deployed)
    on_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
    configs = _configs(tmp_path / "models", "cuda" if on_gpu else "cpu")
    embedded = ("python", "pytorch")  # the embedded server's pytorch is a Python backend too
    python = [c for c in configs if c.backend in (("python",) if on_gpu else embedded)]
    processes = {c.name: max(1, sum(g.count for g in c.instance_group)) for c in python}
    (preprocess,) = (c for c in configs if c.name == "preprocess")
    pixels = int(preprocess.parameters["max_image_pixels"].string_value)
    (shm,) = (v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm")
    size, limits = quantity(shm["sizeLimit"]), container["resources"]["limits"]
    cores, limit = int(quantity(limits["cpu"])), int(quantity(limits["memory"]))
    processes["preprocess"] = sizing.processes(cores, pixels, limit, int(size))
    processes["postprocess"] = sizing.naming(processes["preprocess"])
    batch = max(c.max_batch_size for c in configs)
    photos = (batch - 1) * 0.1e6 + 10e6  # one of 10 MB among the usual ones
    answers = batch * (256 * 256 * 3 + 4 * (19167 + 512 * 257))  # pixels in, all outputs back
    assert shm["medium"] == "Memory"
    assert size >= sum(processes.values()) * 64 * MIB + photos + answers
    # Each process decodes so many pixels at once, which take up to 16 bytes each (a WebP; a
    # progressive JPEG in CMYK 12, others 4 to 10).
    decoding = processes["preprocess"] * pixels * 16
    measured = 1.3e9  # the embedded server after a load of all tasks, /dev/shm not counted
    measured += gpu.PINNED_POOL if on_gpu else 0
    assert limit >= size + decoding + measured


def _configs(folder: Path, device: str) -> list[ModelConfig]:
    """The configurations that the builder of an overlay would write."""
    command = [BIN / "vit-builder", "--checkpoint", GOLDENS / "tiny.pt", "--output", folder]
    done = subprocess.run([*command, "--device", device], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = folder.glob("*/config.pbtxt")
    return [text_format.Parse(file.read_text(), ModelConfig()) for file in files]


@pytest.mark.parametrize(
    ("name", "copied"), [("alerts.yaml", "prometheus-rule.yaml"), ("edge.yaml", "edge-rule.yaml")]
)
def test_rules_are_those_of_docker_monitoring(name: str, copied: str) -> None:
    """Kustomize reads no file outside of its folder, so there are two copies."""
    alerts = (ROOT / "docker/monitoring" / name).read_text()
    rule = (FOLDER / "components/monitoring" / copied).read_text()
    groups = alerts[alerts.index("groups:") :].splitlines()
    indented = "\n".join(f"  {line}" if line else "" for line in groups)
    assert rule.partition("spec:\n")[2].rstrip() == indented, f"copy the groups of {name}"


def test_tls_leaves_no_way_around_it(tmp_path: Path) -> None:
    objects = rendered.composed(tmp_path, "overlays/gpu", "tls")
    assert {p["name"] for p in find(objects, "Service")["spec"]["ports"]} == {"grpc", "metrics"}
    clients, _ = find(objects, "NetworkPolicy")["spec"]["ingress"]
    assert clients["ports"] == [{"port": "grpc"}]


def test_traces_reach_the_collector(tmp_path: Path) -> None:
    """The server's option names it, the two policies let them through, and it is configured."""
    objects = rendered.composed(tmp_path, "overlays/cpu", "tracing")
    server = find(objects, "Deployment")["spec"]["template"]
    container = server["spec"]["containers"][0]
    args, _ = options.read(container["args"][1:])
    where = urlsplit(args.otlp)
    service = find(objects, "Service", where.hostname or "")["spec"]
    (port,) = (p for p in service["ports"] if p["port"] == where.port)
    collector = find(objects, "Deployment", "vit-collector")["spec"]["template"]
    labels = collector["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    (part,) = collector["spec"]["containers"]
    ports = {p["name"]: p["containerPort"] for p in part["ports"]}
    assert ports[port["targetPort"]] == where.port

    out = find(objects, "NetworkPolicy")["spec"]["egress"][-1]
    assert out["to"] == [{"podSelector": {"matchLabels": labels}}]
    assert out["ports"] == [{"port": where.port}]
    policy = find(objects, "NetworkPolicy", "vit-collector")["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    senders, (own, _) = policy["ingress"][0], policy["ingress"][0]["from"]
    assert own["podSelector"]["matchLabels"].items() <= server["metadata"]["labels"].items()
    assert {"port": port["targetPort"]} in senders["ports"]

    (volume,) = collector["spec"]["volumes"]
    files = find(objects, "ConfigMap", volume["configMap"]["name"])["data"]
    (mount,) = part["volumeMounts"]
    (argument,) = part["args"]
    config = yaml.safe_load(files[Path(argument.partition("=")[2]).name])
    assert argument == f"--config={mount['mountPath']}/collector.yaml"
    listening = config["receivers"]["otlp"]["protocols"]
    for name, protocol in (("otlp-http", "http"), ("otlp-grpc", "grpc")):
        assert listening[protocol]["endpoint"] == f"0.0.0.0:{ports[name]}"
    assert config["extensions"]["health_check"]["endpoint"] == f"0.0.0.0:{ports['health']}"
    (variable,) = part["env"]
    assert config["exporters"]["otlp_http"]["endpoint"] == f"${{env:{variable['name']}}}"
    most = config["processors"]["memory_limiter"]["limit_mib"] * MIB
    assert most < quantity(part["resources"]["limits"]["memory"])


def test_docs_name_what_is_there() -> None:
    text = (ROOT / "docker/README.md").read_text().partition("## In a cluster")[2]
    named = set(re.findall(r"docker/kubernetes/[\w/.-]+\w", text))
    named |= {
        f"docker/kubernetes/{n}" for n in re.findall(r"`((?:overlays|components)/[\w-]+)`", text)
    }
    assert {f.parent for f in FOLDER.glob("[oc]*/*/kustomization.yaml")} <= {
        ROOT / n for n in named
    }
    assert not [name for name in named if not (ROOT / name).exists()]
    assert set(re.findall(r"`(vit-[\w-]+)`", text)) >= SECRETS
