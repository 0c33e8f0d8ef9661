"""Benchmarks: this machine's limits, our server, and other servers for comparison."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any


class ScriptError(Exception):
    """A benchmark script failed; it reported the reason on standard error."""


def figures(python: Path, script: Path, *arguments: object) -> dict[str, Any]:
    """Run a script with the peers' Python; return its last line of output, parsed from JSON."""
    command = [str(python), str(script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900)
    if done.returncode != 0:
        raise ScriptError(f"{script.name} {arguments[0]} failed, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def say(text: str) -> None:
    """Report progress."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)
