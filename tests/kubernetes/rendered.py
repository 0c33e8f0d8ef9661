"""What `kubectl kustomize` makes of docker/kubernetes, and whether a cluster would take it."""

import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from conftest import BIN

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
CRDS = Path(__file__).parent / "crds"
# The oldest that takes everything that is used: preStop.sleep is on by default from 1.30.
VERSIONS = ("1.30", "1.37")


@cache
def kustomize(folder: Path) -> list[Object]:
    """The objects that `kubectl apply -k` would send. Raises CalledProcessError."""
    command = [BIN / "kubectl", "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"{folder}: {done.stderr}")
    return list(yaml.safe_load_all(done.stdout))


def composed(folder: Path, base: str, *components: str) -> list[Object]:
    """A folder of manifests with components, put together in `folder` as a user would."""

    def relative(path: Path) -> str:
        return os.path.relpath(path, folder.resolve())

    kustomization = {
        "resources": [relative(FOLDER / base)],
        "components": [relative(FOLDER / "components" / name) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(folder)


def validate(thing: Object, version: str = VERSIONS[-1]) -> None:
    """Raise jsonschema.ValidationError for what an API server would refuse or not know."""
    schema = CRDS / f"{thing['apiVersion'].replace('/', '-')}-{thing['kind'].lower()}.yaml"
    if schema.is_file():
        jsonschema.Draft202012Validator(_strict(_load(schema))).validate(thing)
    else:
        kubernetes_validate.validate(thing, version, strict=True)


def find(objects: list[Object], kind: str, name: str = "vit") -> Object:
    """The one object of this kind and name."""
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """The pod that each object makes: its name for a message, and its specification."""
    for thing in objects:
        name = f"{thing['kind']} {thing['metadata']['name']}"
        if thing["kind"] in ("Deployment", "Job"):
            yield name, thing["spec"]["template"]["spec"]
        elif thing["kind"] == "InferenceService":
            # KServe lays the two over each other.
            runtime = find(
                objects, "ServingRuntime", thing["spec"]["predictor"]["model"]["runtime"]
            )
            yield name, {**runtime["spec"], **thing["spec"]["predictor"]}


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def server(objects: list[Object]) -> tuple[Object, Object]:
    """The pod that serves, and its container."""
    (pod,) = (p for _, p in pods(objects) if any("readinessProbe" in c for c in p["containers"]))
    return pod, pod["containers"][0]


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: 200m, 4, 512Mi."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    unit = next((u for u in units if text.endswith(u)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


@cache
def _load(schema: Path) -> Object:
    loaded: Object = yaml.load(schema.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


def _strict(schema: Any) -> Any:
    """The same schema, but a field that it does not name is an error."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        key: {name: _strict(part) for name, part in value.items()}
        if key == "properties"
        else _strict(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict
