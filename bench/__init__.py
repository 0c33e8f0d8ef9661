"""The yardsticks: what this machine can do at best, and what other servers make of it."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any


class ScriptError(Exception):
    """A part of the comparison failed; why, it has said on standard error."""


def figures(python: Path, script: Path, *arguments: object) -> dict[str, Any]:
    """What a script prints last, run by the Python of the environment with the peers."""
    command = [str(python), str(script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900)
    if done.returncode != 0:
        raise ScriptError(f"{script.name} {arguments[0]} failed, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)
