"""The real Prometheus and promtool: from the PATH, or Debian's package, unpacked without root."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ports import wait_for

from bench.ports import free_ports

MONITORING = Path(__file__).parents[1] / "docker" / "monitoring"
Sample = tuple[dict[str, str], float]


def program(name: str, cache: Path) -> Path:
    """Path of `prometheus` or `promtool`; skips the test if neither way provides it."""
    if found := shutil.which(name):
        return Path(found)
    unpacked = cache / "unpacked" / "usr" / "bin" / name
    if not unpacked.is_file():
        if not shutil.which("apt-get"):
            pytest.skip(f"no {name} on the PATH, and no apt-get to fetch Debian's package with")
        try:
            _fetch(cache)
        except subprocess.CalledProcessError as e:
            pytest.skip(f"no {name} on the PATH, and apt-get cannot fetch it: {e.stderr}")
    return unpacked


def _fetch(cache: Path) -> None:
    """Unpack Debian's package in `cache`, with separate package lists: the system's need root."""
    for folder in ("lists/partial", "archives/partial"):
        (cache / folder).mkdir(parents=True, exist_ok=True)
    places = (f"Dir::State::Lists={cache / 'lists'}", f"Dir::Cache={cache}")
    # Without the sandbox user, which has no write permission here.
    options = [f"-o{place}" for place in (*places, "APT::Sandbox::User=")]
    for command in (
        ["apt-get", "-qq", *options, "update"],
        ["apt-get", "-qq", *options, "download", "prometheus"],
        ["sh", "-c", "dpkg-deb -x prometheus_*.deb unpacked && rm -r prometheus_*.deb lists"],
    ):
        subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True, timeout=200)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus with the project's rules."""

    url: str

    def query(self, expression: str) -> list[Sample]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=10) as response:
            data: Any = json.load(response)["data"]["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in data]

    def wait(
        self, expression: str, fits: Callable[[float], bool] = lambda _: True, seconds: float = 120
    ) -> list[Sample]:
        """Query until there is a result and all its values satisfy `fits`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            samples = self.query(expression)
            if samples and all(fits(value) for _, value in samples):
                return samples
            time.sleep(0.5)
        pytest.fail(f"after {seconds} s {expression} is {samples}")


@contextlib.contextmanager
def prometheus(
    metrics_url: str, cache: Path, folder: Path, job: str = "vit"
) -> Iterator[Prometheus]:
    """Scrape one server, or edge, every second, under the project's configuration and rules."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (scrape,) = config["scrape_configs"] = [
        scrape for scrape in config["scrape_configs"] if scrape["job_name"] == job
    ]
    del scrape["dns_sd_configs"]
    target = urllib.parse.urlsplit(metrics_url).netloc
    # The labels that a target has in a cluster.
    labels = {"namespace": "vit", "pod": "vit-0"}
    scrape["static_configs"] = [{"targets": [target], "labels": labels}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [program("prometheus", cache), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            wait_for(f"http://{address}/-/ready", process)
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
