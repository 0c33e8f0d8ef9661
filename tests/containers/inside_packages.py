"""Runs in an image: what dpkg and pip have installed there, as JSON.

Programs that neither of them knows are told by variables of the base image.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

release = dict(
    line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
)
fields = ("Package", "Version", "Architecture", "source:Package", "source:Version")
form = "\t".join(f"${{{field}}}" for field in fields) + "\n"
listed = subprocess.check_output(["dpkg-query", "--show", "--showformat", form], text=True)
# In every folder, also in those of a Python that is not the first on the PATH.
folders = sorted(
    {str(path.parent) for top in ("/opt", "/usr") for path in Path(top).rglob("*.dist-info")}
)
python = {
    (one.metadata["Name"], one.version) for one in importlib.metadata.distributions(path=folders)
}
generic = {"python": platform.python_version(), "tritonserver": os.getenv("TRITON_SERVER_VERSION")}
print(
    json.dumps(
        {
            "system": release["ID"].strip('"'),
            "release": release["VERSION_ID"].strip('"'),
            "deb": [line.split("\t") for line in listed.splitlines()],
            "pypi": sorted(python),
            "generic": [item for item in generic.items() if item[1]],
        }
    )
)
