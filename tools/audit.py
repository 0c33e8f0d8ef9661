"""`make lint`: checks the installed packages for known vulnerabilities, by pip-audit and OSV.

If OSV cannot be reached, nothing is audited: that is reported, and is not a failure.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

OURS = ("vit-builder", "vit-client", "vit-server")


def main(*options: str) -> int:
    # Without local versions: an advisory for torch 2.13.0 applies to 2.13.0+cpu.
    installed = {d.name: d.version.partition("+")[0] for d in distributions() if d.name not in OURS}
    # One query first: pip-audit skips what it cannot look up, and would report success.
    probe = audit({"pip": installed["pip"]}, *options)
    if probe is None:
        print("audit: the advisory database (osv.dev) cannot be reached: NOTHING WAS AUDITED")
        return 0
    found = audit(installed, *options)
    if found is None:
        print("audit: interrupted half-way: not all packages were audited")
        return 0
    for package in (bad := [p for p in found if p.get("vulns")]):
        for advisory in package["vulns"]:
            fixed = ", ".join(advisory["fix_versions"]) or "none yet"
            print(
                f"audit: {package['name']} {package['version']}: {advisory['id']} (fixed: {fixed})"
            )
    print(f"audit: {len(found)} packages, {len(bad)} with known vulnerabilities")
    return int(bool(bad))


def audit(packages: dict[str, str], *options: str) -> list[dict] | None:
    """Return pip-audit's findings, or None if it could not query OSV."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.txt")
        file.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
        command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv"]
        command += ["--requirement", str(file), "--no-deps", "--disable-pip", "--format", "json"]
        command += ["--progress-spinner", "off", "--timeout", "10", *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(result.stdout)["dependencies"]
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
