"""Every expression against a real Prometheus that scrapes the real server under load."""

import json
import math
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import PHOTOS, Server, at_each_batch, copy, serving
from nvidia import health, plain_triton, post
from prometheus import MONITORING, Prometheus, program, prometheus

from bench.ports import free_ports

PHOTO = (PHOTOS / "coffee.jpg").read_bytes()
SLOW = 2.5  # seconds, over the goal of 2
ENSEMBLES = ("classify", "probabilities", "embed", "features", "analyze", "everything")
GROUPS = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
LABELS = {
    "instance": ["instance", "job", "namespace", "pod"],
    "job": ["job", "namespace"],
    "vit": [],
}
DASHBOARD = json.loads((MONITORING / "grafana" / "vit.json").read_text())


@contextmanager
def load(url: str, threads: int) -> Iterator[list[tuple[int, float]]]:
    """All questions without a pause; status and seconds of each answer."""
    stop = threading.Event()
    answers: list[tuple[int, float]] = []

    def ask(model: str) -> None:
        while not stop.is_set():
            start = time.monotonic()
            code = post(f"{url}/v2/models/{model}/infer", PHOTO)
            answers.append((code, time.monotonic() - start))

    models = [ENSEMBLES[i % len(ENSEMBLES)] for i in range(threads)]
    askers = [threading.Thread(target=ask, args=(model,)) for model in models]
    for asker in askers:
        asker.start()
    try:
        yield answers
    finally:
        stop.set()
        for asker in askers:
            asker.join()


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", MONITORING / "prometheus.yml"),
        ("check", "rules", MONITORING / "alerts.yaml"),
        ("check", "rules", MONITORING / "edge.yaml"),
        ("test", "rules", Path(__file__).parent / "alerts_test.yaml"),
    ],
    ids=["config", "rules", "rules of the edge", "unit tests"],
)
def test_promtool(arguments: tuple[str | Path, ...], cache: Path) -> None:
    subprocess.run([program("promtool", cache), *arguments], check=True)


def test_every_alert_has_a_unit_test_and_a_place_in_the_runbook() -> None:
    tested = (Path(__file__).parent / "alerts_test.yaml").read_text()
    runbook = (MONITORING.parent / "README.md").read_text()
    edge = yaml.safe_load((MONITORING / "edge.yaml").read_text())["groups"]
    for rule in (*RULES, *(rule for group in edge for rule in group["rules"])):
        if "alert" in rule:
            assert re.search(rf"alertname: {rule['alert']}\n\s+exp_alerts:\n", tested)
            assert f"`{rule['alert']}`" in runbook


def dashboard_expressions() -> list[str]:
    """Those that a server without a GPU and an edge has an answer to."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [
        re.sub(r"\$__(rate_interval|range)", "1m", expression).replace("$instance", ".*")
        for expression in found
        if "nv_gpu_" not in expression and "vit_edge_" not in expression
    ]


def autoscaling_expressions() -> list[str]:
    file = MONITORING.parent / "kubernetes" / "components" / "keda" / "scaled-object.yaml"
    triggers = yaml.safe_load(file.read_text())["spec"]["triggers"]
    return [trigger["metadata"]["query"] for trigger in triggers]


@pytest.fixture(scope="module")
def watched(
    tiny_server: Server, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(tiny_server.metrics_url, cache, folder) as running:
        running.wait('up{job="vit"}', lambda value: value == 1)
        yield running


def test_bad_images_are_told_from_failures(tiny_server: Server, watched: Prometheus) -> None:
    of_ensemble = 'sum(nv_inference_request_failure{model="embed"})'
    of_models = 'sum(nv_inference_request_failure{model=~"preprocess|vit|postprocess"})'
    ((_, before),), ((_, models_before),) = watched.wait(of_ensemble), watched.wait(of_models)
    # Other tests' requests, of which a scrape sees some half done, have left the last minute.
    watched.wait("instance:vit_answered:rate1m", lambda value: value < 1)
    watched.wait("instance:vit_refused:rate1m", lambda value: value == 0)
    for _ in range(3):
        assert post(f"{tiny_server.http_url}/v2/models/embed/infer", b"not an image") == 400
    watched.wait(of_ensemble, lambda value: value == before + 6)  # each counts twice
    watched.wait("instance:vit_failed:rate1m", lambda value: value > 0)
    assert watched.query(of_models)[0][1] == models_before
    assert watched.query("instance:vit_refused:rate1m")[0][1] < 0.03  # 3 would be 0.05
    # Nor are they the server's fault, once `preprocess` has told of them.
    watched.wait("abs(job:vit_faults:rate1m)", lambda value: value < 0.001)
    (alert,) = watched.wait('ALERTS{alertname="VitBadImages", alertstate="pending"}')
    assert alert[0]["reason"] == "not_an_image"


def test_under_load(tiny_server: Server, watched: Prometheus) -> None:
    total = f'sum(nv_inference_request_success{{model=~"{"|".join(ENSEMBLES)}"}})'
    failures = "sum(nv_inference_request_failure)"
    ((_, before),), ((_, failed_before),) = watched.wait(total), watched.wait(failures)
    with load(tiny_server.http_url, threads=16) as answers:
        for rule in RULES:
            if "record" in rule:
                ((labels, _),) = watched.wait(rule["record"])
                level = rule["record"].partition(":")[0]
                assert set(labels) == {"__name__", *LABELS[level]}
        for expression in (*dashboard_expressions(), *autoscaling_expressions()):
            watched.wait(expression)
        watched.wait("instance:vit_pending:avg1m", lambda value: 0 < value < 16)
        ((_, waited),) = watched.wait("instance:vit_queue_seconds:rate1m", lambda value: value > 0)
        # Never the ensembles' own: they have no queue.
        ensembles = f'model=~"{"|".join(ENSEMBLES)}"'
        assert not watched.query(f"nv_inference_pending_request_count{{{ensembles}}} > 0")
        of_all = 'rate(nv_inference_queue_duration_us{model=~"preprocess|vit|postprocess"}[1m])'
        of_ensembles = f"rate(nv_inference_queue_duration_us{{{ensembles}}}[1m])"
        watched.wait(f"sum({of_ensembles}) / sum({of_all})", lambda share: share < 0.05)
    assert {code for code, _ in answers} == {200}
    slowest = max(seconds for _, seconds in answers)
    assert waited < slowest
    watched.wait(total, lambda value: value == before + len(answers))
    assert watched.query(failures)[0][1] == failed_before


def test_a_full_queue_is_seen(tiny_repository: Path, cache: Path, tmp_path: Path) -> None:
    repository = copy(tiny_repository, tmp_path)
    config = repository / "preprocess" / "config.pbtxt"
    changed, count = re.subn(r"max_queue_size: \d+", "max_queue_size: 1", config.read_text())
    assert count == 1
    config.write_text(changed)
    with (
        plain_triton(repository) as server,
        prometheus(server.metrics_url, cache, tmp_path) as watching,
        load(server.http_url, threads=16) as answers,
    ):
        watching.wait("instance:vit_refused:rate1m", lambda value: value > 0)
        watching.wait('ALERTS{alertname="VitRequestsRejected", alertstate="pending"}')
        watching.wait('ALERTS{alertname="VitErrorBudget"}')
        # Busy is not broken.
        assert health(server.http_url) == (0, "")
        # What one would ask for first, and why it is not asked for: Triton counts no full queue.
        rejected = watching.query('sum(nv_inference_request_failure{reason="REJECTED"})')
        assert rejected[0][1] == 0
    assert {code for code, _ in answers} == {200, 503}


@pytest.mark.parametrize("dead", ["preprocess", "postprocess"])
def test_a_dead_model_is_seen(
    tiny_repository: Path, cache: Path, tmp_path: Path, dead: str
) -> None:
    with plain_triton(tiny_repository) as server:
        server.kill_stub(dead)
        with prometheus(server.metrics_url, cache, tmp_path) as watching:
            watching.wait('up{job="vit"}', lambda value: value == 1)
            assert health(server.http_url)[0] == 1  # is what is counted
            found = watching.wait('ALERTS{alertname="VitModelDead"}')
            assert [labels["model"] for labels, _ in found] == [dead]


def test_probes_are_not_traffic(tiny_repository: Path, cache: Path, tmp_path: Path) -> None:
    idle = 'ALERTS{alertname="VitNoTraffic", alertstate="pending"}'
    with (
        plain_triton(tiny_repository) as server,
        prometheus(server.metrics_url, cache, tmp_path) as watching,
    ):
        ((_, before),) = watching.wait("vit_preprocess_megapixels_count")
        for _ in range(5):
            assert health(server.http_url) == (0, "")
        watching.wait("vit_preprocess_megapixels_count", lambda value: value == before + 10)
        # Answers in general, which include them, are more than none at the same moment.
        watching.wait(f"{idle} and on() (instance:vit_answered:rate1m > 0.01)")
        for _ in range(20):
            assert post(f"{server.http_url}/v2/models/embed/infer", PHOTO) == 200
        watching.wait(f"absent({idle})")


def test_a_restart_is_seen(tiny_repository: Path, cache: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    served = 'sum(nv_inference_request_success{model="preprocess"})'
    with prometheus(f"http://127.0.0.1:{port}/metrics", cache, tmp_path) as watching:
        for requests in (5, 1):
            with plain_triton(tiny_repository, port) as server:
                for _ in range(requests):
                    assert post(f"{server.http_url}/v2/models/embed/infer", PHOTO) == 200
                watching.wait(served, lambda value, requests=requests: value == requests)
                if requests == 5:
                    assert not watching.query('ALERTS{alertname="VitServerRestarted"}')
        watching.wait('ALERTS{alertname="VitServerRestarted", alertstate="firing"}')


def test_slow_requests_are_seen(tiny_repository: Path, cache: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    repository = at_each_batch(
        tiny_repository, tmp_path, f"if os.path.exists({str(slow)!r}): time.sleep({SLOW})"
    )
    p99 = 'nv_inference_request_summary_us{quantile="0.99"}'
    late = 'ALERTS{alertname="VitLatencyBudget"}'
    with (
        serving(repository) as server,
        prometheus(server.metrics_url, cache, tmp_path) as watching,
    ):
        # Triton has an ensemble under two versions, and one of them is never asked.
        watching.wait(f"{p99} unless {p99} >= 0", math.isnan)
        watching.wait("job:vit_slow:ratio", lambda value: value == 0)
        with load(server.http_url, threads=len(ENSEMBLES)) as answers:
            watching.wait("instance:vit_p99_seconds:max", lambda value: value > 0)
            slow.touch()
            watching.wait("job:vit_slow:ratio", lambda value: value == 1)
            watching.wait(late)
            ((_, measured),) = watching.query("instance:vit_p99_seconds:max")
    assert {code for code, _ in answers} == {200}
    # Triton's time is within the callers', and the slow ones of these are all longer than that.
    assert SLOW <= measured <= max(seconds for _, seconds in answers)
