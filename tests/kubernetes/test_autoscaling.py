"""The figures that autoscaling goes by: recorded by the rules, asked for by the right names."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import program

from . import rendered
from .rendered import FOLDER, ROOT, find

ALERTS = ROOT / "docker/monitoring/alerts.yaml"
LABELS = {"job": "vit", "namespace": "vit", "version": "1"}
# Seconds waited and requests that wait, in two pods that are not alike.
PODS = {"vit-a": (0.3, 24), "vit-b": (0.1, 8)}
RATE = 10  # requests a second in each
# Another, of overlays/canary: no autoscaler of the servers is to go by it.
CANARY = ("vit-canary-a", (0.9, 100))


def adapter() -> list[dict[str, Any]]:
    values = FOLDER / "components/autoscaling/prometheus-adapter.yaml"
    rules: list[dict[str, Any]] = yaml.safe_load(values.read_text())["rules"]["custom"]
    return rules


def keda(folder: Path) -> list[dict[str, Any]]:
    objects = rendered.composed(folder, "overlays/gpu", "monitoring", "keda")
    triggers: list[dict[str, Any]] = find(objects, "ScaledObject")["spec"]["triggers"]
    return triggers


def test_hpa_asks_for_what_the_adapter_offers() -> None:
    hpa = find(rendered.kustomize(FOLDER / "overlays/example"), "HorizontalPodAutoscaler")
    asked = {metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in adapter()}


# Seconds that a request may wait, and how many wait then: Little's law, at docker/README's rates.
THRESHOLDS = {"overlays/cpu": (0.2, 16), "overlays/gpu": (0.05, 256)}


@pytest.mark.parametrize("overlay", THRESHOLDS)
def test_hpa_and_keda_agree(overlay: str, tmp_path: Path) -> None:
    objects = rendered.composed(tmp_path, overlay, "monitoring", "autoscaling")
    hpa = find(objects, "HorizontalPodAutoscaler")["spec"]
    targets = [m["pods"]["target"]["averageValue"] for m in hpa["metrics"]]
    (tmp_path / "keda").mkdir()
    objects = rendered.composed(tmp_path / "keda", overlay, "monitoring", "keda")
    scaled = find(objects, "ScaledObject")["spec"]
    thresholds = [trigger["metadata"]["threshold"] for trigger in scaled["triggers"]]
    assert [rendered.quantity(t) for t in targets] == list(THRESHOLDS[overlay])
    assert [float(t) for t in thresholds] == list(THRESHOLDS[overlay])
    assert scaled["minReplicaCount"] == hpa["minReplicas"]
    assert scaled["maxReplicaCount"] == hpa["maxReplicas"]
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]


@pytest.mark.parametrize("scaler", ["autoscaling", "keda"])
def test_an_autoscaler_has_the_number_of_replicas_to_itself(scaler: str, tmp_path: Path) -> None:
    objects = rendered.composed(tmp_path, "overlays/gpu", scaler)
    assert "replicas" not in find(objects, "Deployment")["spec"]


def test_queries(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Prometheus' own promtool asks, of two pods as the ServiceMonitor labels them."""
    (tmp_path / "overlay").mkdir()
    seconds, pending = keda(tmp_path / "overlay")
    assert (seconds["metricType"], pending["metricType"]) == ("Value", "AverageValue")
    expected = [
        (seconds["metadata"]["query"], [{"value": 0.2}]),
        (pending["metadata"]["query"], [{"value": 32}]),
    ]
    for number, rule in enumerate(adapter()):
        samples = [{"labels": f'{{pod="{p}"}}', "value": PODS[p][number]} for p in PODS]
        expected.append((_expanded(rule), samples))
    tests = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": _series(),
                "promql_expr_test": [
                    {"expr": expr, "eval_time": "10m", "exp_samples": samples}
                    for expr, samples in expected
                ],
            }
        ],
    }
    file = tmp_path / "tests.yaml"
    file.write_text(json.dumps(tests))  # which is YAML too
    promtool = program("promtool", request.config.cache.mkdir("prometheus"))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _expanded(rule: dict[str, Any]) -> str:
    """The adapter's query as it fills it in for pods of a Deployment."""
    series = rule["seriesQuery"].partition("{")[0]
    matchers = f'namespace="vit",pod=~"{"|".join(PODS)}"'
    query = rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.GroupBy>>", "pod")
    query = query.replace("<<.LabelMatchers>>", matchers)
    assert not re.search("<<|>>", query)
    return str(query)


def _series() -> list[dict[str, str]]:
    """What Triton counts: all of the waiting in `vit`, and nothing of use in the ensemble."""
    found = []
    for pod, (seconds, pending) in (*PODS.items(), CANARY):
        step = RATE * 15
        for name, model, values in (
            ("nv_inference_request_success", "embed", f"0+{step}x100"),
            ("nv_inference_request_success", "preprocess", f"0+{step}x100"),
            ("nv_inference_queue_duration_us", "vit", f"0+{round(step * seconds * 1e6)}x100"),
            ("nv_inference_queue_duration_us", "embed", "0x100"),
            ("nv_inference_pending_request_count", "vit", f"{pending}x100"),
            ("nv_inference_pending_request_count", "embed", "0x100"),
        ):
            labels = {**LABELS, "pod": pod, "instance": f"{pod}:8002", "model": model}
            labels["service"] = pod.rpartition("-")[0]  # as the operator's Prometheus has it
            text = ", ".join(f'{key}="{value}"' for key, value in labels.items())
            found.append({"series": f"{name}{{{text}}}", "values": values})
    return found
