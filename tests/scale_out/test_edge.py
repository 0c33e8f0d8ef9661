"""docker/edge before several servers: what a client notices of the comings and goings of either."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.edge import edge
from bench.edge.edge import Edge

from .fleet import Fleet
from .load import load

pytestmark = pytest.mark.timeout(600)


def by_name(three: Fleet) -> Any:
    """Ask the fleet's DNS server for the addresses of `vit`, as a cluster's."""
    authority, _, target = three.url.removeprefix("dns://").partition("/")
    host, port = target.rsplit(":", 1)
    resolver = {
        "name": "envoy.network.dns_resolver.cares",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3"
            ".CaresDnsResolverConfig",
            "resolvers": [
                {"socket_address": {"address": "127.0.0.1", "port_value": int(authority[10:])}}
            ],
            "dns_resolver_options": {"no_default_search_domain": True},
        },
    }

    def change(config: Any) -> None:
        vit = edge.clusters(config)["vit"]
        # A copy: the other clusters share it, and are empty here.
        kind = vit["cluster_type"]["typed_config"]
        vit["cluster_type"] = {
            "name": "envoy.clusters.dns",
            "typed_config": {**kind, "typed_dns_resolver_config": resolver},
        }
        address = {"socket_address": {"address": host, "port_value": int(port)}}
        vit["load_assignment"]["endpoints"] = [
            {"lb_endpoints": [{"endpoint": {"address": address}}]}
        ]

    return change


def enough(routes: str) -> str:
    return routes.replace(
        "tokens: 200, tokens_per_fill: 100", "tokens: 99999, tokens_per_fill: 99999"
    )


@pytest.fixture
def door(three: Fleet, tmp_path: Path) -> Iterator[Edge]:
    with edge.running(tmp_path, {}, change=by_name(three), edit={"routes.yaml": enough}) as running:
        yield running


def test_traffic_spreads_over_all_servers(three: Fleet, door: Edge) -> None:
    with load(door.url, three.replicas[0].url, **door.client()) as requests:
        requests.go_on(1)
        before = [replica.answered() for replica in three.replicas]
        requests.go_on(4)
        shares = [r.answered() - b for r, b in zip(three.replicas, before, strict=True)]
    print(f"{requests}; {shares}")
    assert not requests.lost
    assert min(shares) > 0.5 * max(shares), shares


def test_a_server_that_is_killed_costs_no_answer(three: Fleet, door: Edge) -> None:
    with load(door.url, three.replicas[0].url, **door.client()) as requests:
        requests.go_on(2)
        three.kill(three.replicas[1])
        requests.go_on(3)
    print(requests)
    assert not requests.lost


def test_servers_that_are_added_and_stopped(three: Fleet, door: Edge) -> None:
    """As a rolling update does it: a new one, then SIGTERM for one that is out of the DNS."""
    with load(door.url, three.replicas[0].url, **door.client()) as requests:
        requests.go_on(1)
        new = three.add()
        before, started = new.answered(), time.monotonic()
        while new.answered() < before + 20 and time.monotonic() - started < 60:
            requests.go_on(0.2)
        assert new.answered() >= before + 20
        three.remove(three.replicas[1], pause=10)
        requests.go_on(1)
    print(requests)
    assert not requests.lost


def test_the_edge_itself_is_replaced(three: Fleet, tmp_path: Path) -> None:
    """A second one on the same port, as behind a Service; the first is drained, and stopped."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    change = by_name(three)
    with (
        edge.running(folders[0], {}, change=change, edit={"routes.yaml": enough}) as first,
        edge.running(
            folders[1], {}, change=change, edit={"routes.yaml": enough}, beside=first
        ) as second,
        load(first.url, three.replicas[0].url, **first.client()) as requests,
    ):
        requests.go_on(1)
        first.post("/drain_listeners?graceful")
        started = time.monotonic()
        while first.connections() and time.monotonic() - started < 100:
            requests.go_on(0.5)
        assert not first.connections()
        first.process.terminate()
        first.process.wait(60)
        requests.go_on(2)
        assert second.connections()
        print(requests)
    assert not requests.lost
