"""Installs perf_analyzer without root, runs it for one load and reads its CSV.

NVIDIA ships the binary in two wheels, and which one runs depends on the C library:
`perf-analyzer` needs glibc 2.38 (Ubuntu 24.04, Debian 13); the last `tritonclient` that includes
it also runs on older systems (Ubuntu 22.04, Debian 12). Neither is installed as a package: only
the binary is copied into the virtual environment, so that its tritonclient is not replaced.
"""

import csv
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_server import installation

# Wheel and SHA-256.
NEWER = (
    "perf-analyzer==2.60.0",
    "23ef56b107ae9233e5cf09fbdf508dd9b936a52f1bae2f63f53c8117087b3f25",
)
OLDER = ("tritonclient==2.50.0", "421fbb69ae6ab8cdb2c35b82134fcef2fe11e7af7718b1fcbc53335ab9bfe889")
WINDOWS = 3


class PerfAnalyzerError(Exception):
    """It cannot be installed, or a measurement failed; the message is for the user."""


@dataclass(frozen=True)
class Measured:
    """perf_analyzer's results over all its windows. Times are in milliseconds."""

    per_second: float  # images answered
    spread: float  # (fastest window - slowest window) / per_second
    mean: float
    p50: float
    p90: float
    p99: float
    command: str  # repeats the measurement by hand


def version() -> str:
    """Return the wheel and version of perf_analyzer for this machine."""
    return (NEWER if _glibc() >= (2, 38) else OLDER)[0]


def install() -> Path:
    """Return the path of the binary in this virtual environment, downloading it if missing.

    Raises:
        PerfAnalyzerError: it cannot be downloaded, or does not run here.
    """
    if platform.machine() != "x86_64":
        raise PerfAnalyzerError(
            f"perf_analyzer is available for x86_64 only, not for {platform.machine()}"
        )
    requirement, sha256 = NEWER if _glibc() >= (2, 38) else OLDER
    binary = Path(sys.prefix) / "perf_analyzer" / requirement / "perf_analyzer"
    if not binary.is_file():
        print(f"Installing perf_analyzer from {requirement} …", file=sys.stderr, flush=True)
        binary.parent.mkdir(parents=True, exist_ok=True)
        _link_libraries(binary.parent)
        fetch(requirement, sha256, binary)
    tried = subprocess.run([binary, "--version"], capture_output=True, text=True, env=_env(binary))
    if tried.returncode != 0:
        raise PerfAnalyzerError(f"{binary} does not run here: {tried.stderr.strip()}")
    return binary


def measure(
    binary: Path, model: str, data: Path, seconds: float, arguments: Sequence[str]
) -> Measured:
    """Run one load on one model.

    Always three windows of `seconds`. By default perf_analyzer continues until three windows in a
    row agree within 10 %, and discards everything if they never do, as on a busy machine; here the
    spread is reported instead.

    Raises:
        PerfAnalyzerError: a request failed, or a window was too short for one response.
    """
    command = [str(binary), "-m", model, "-i", "grpc", "--async", "--input-data", str(data)]
    command += ["--measurement-interval", str(round(seconds * 1000)), "-v"]
    command += ["--max-trials", str(WINDOWS), "--stability-percentage", "1000", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"
        output = _run([*command, "-f", str(report), "--verbose-csv"], _env(binary), seconds)
        if not report.is_file():
            raise PerfAnalyzerError(_reason(output))
        with report.open(newline="") as file:
            row = next(csv.DictReader(file))
    passes = [float(found) for found in re.findall(r"Pass \[\d+\] throughput: ([\d.]+)", output)]
    per_second = float(row["Inferences/Second"])

    def milliseconds(name: str) -> float:
        return float(row[f"{name} latency"]) / 1000

    return Measured(
        per_second=per_second,
        spread=(max(passes) - min(passes)) / per_second,
        mean=milliseconds("Avg"),
        p50=milliseconds("p50"),
        p90=milliseconds("p90"),
        p99=milliseconds("p99"),
        command=shlex.join(command),
    )


def _run(command: list[str], env: dict[str, str], seconds: float) -> str:
    limit = WINDOWS * seconds + 120  # it waits for requests in flight, at start and end
    try:
        done = subprocess.run(
            command,
            env=env,
            timeout=limit,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired:
        raise PerfAnalyzerError(f"no end after {limit:.0f} s: does the server answer?") from None
    return done.stdout


def _reason(output: str) -> str:
    """Return the line of perf_analyzer's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if refused := [line for line in lines if "had error: " in line]:  # the server's error message
        return re.sub(r"\[request id: \d+\] ", "", refused[0].partition("had error: ")[2])
    if "No valid requests recorded" in output:
        return "no request was answered within a window: increase --seconds"
    told = [line for line in lines if re.search("error|fail", line, re.IGNORECASE)]
    return (told or lines or ["perf_analyzer exited without a result or a message"])[0]


def fetch(requirement: str, sha256: str, binary: Path, tag: str = "") -> None:
    """Download the wheel with pip, which checks the hash, and extract the binary.

    `tag` selects the wheel for another platform.
    """
    with tempfile.TemporaryDirectory(dir=binary.parent) as name:
        folder = Path(name)
        (folder / "pinned.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
        options = ["--no-deps", "--only-binary=:all:", "--dest", name, "-r", f"{name}/pinned.txt"]
        options += ["--platform", tag] if tag else []
        if subprocess.run([*pip, *options]).returncode != 0:
            raise PerfAnalyzerError(f"pip could not download {requirement}, see above")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            inside = next(n for n in wheel.namelist() if n.endswith("bin/perf_analyzer"))
            extracted = Path(wheel.extract(inside, folder))
        extracted.chmod(0o755)
        extracted.rename(binary)


def _link_libraries(folder: Path) -> None:
    """Link two libraries that the older binary needs, from the server's wheel."""
    libraries = installation.find().libraries
    for wanted, pattern in (("libb64.so.0d", "libb64-*.so.0d"), ("libcudart.so.12", "libcudart-*")):
        link = folder / wanted
        link.unlink(missing_ok=True)
        link.symlink_to(next(libraries.glob(pattern)))


def _env(binary: Path) -> dict[str, str]:
    paths = [str(binary.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(path for path in paths if path)}


def _glibc() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2])
