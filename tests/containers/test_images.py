"""The images as the Dockerfile makes them: what is in them, and that it is the same each time."""

import json
from typing import Any

import pytest

from .bases import ROOT, Bases
from .conftest import IMAGES, build
from .engine import TOKEN, Engine
from .sbom import faults, inside, sbom

SBOM = ROOT / "sbom"
Found = dict[str, Any]


@pytest.fixture(scope="module")
def packages(docker: Engine, images: dict[str, str]) -> dict[str, Found]:
    """What is installed in each image."""
    return {
        target: json.loads(inside(docker, image, "inside_packages.py"))
        for target, image in images.items()
    }


def names(found: Found) -> set[str]:
    return {name.lower() for name, _ in found["pypi"]}


def test_what_is_installed(packages: dict[str, Found]) -> None:
    assert {"torch", "vit-builder"} <= names(packages["builder"])
    assert {"torch", "vit-server", "nvidia-pytriton"} <= names(packages["cpu"])
    assert {"vit-server", "aiohttp", "llvmlite", "pillow", "simplejpeg"} <= names(packages["gpu"])
    # No second Triton beside NVIDIA's.
    assert "nvidia-pytriton" not in names(packages["gpu"])
    assert "vit-server" not in names(packages["builder"])


def test_gpu_gets_no_torch(docker: Engine, packages: dict[str, Found], built_on: Bases) -> None:
    base = names(json.loads(inside(docker, built_on.args["TRITON_IMAGE"], "inside_packages.py")))
    assert not {name for name in names(packages["gpu"]) - base if "torch" in name}


@pytest.mark.parametrize("target", IMAGES)
def test_bill_of_materials(docker: Engine, packages: dict[str, Found], target: str) -> None:
    found = packages[target]
    image = docker.inspect(IMAGES[target])
    text = sbom(f"vit-{target}", image["Id"], found)
    assert faults(text) == ""
    components = json.loads(text)["components"]
    purls = {component["purl"] for component in components}
    assert len(purls) == len(found["deb"]) + len(found["pypi"]) + len(found["generic"])
    assert any(purl.startswith(f"pkg:deb/{found['system']}/libc6@") for purl in purls)
    assert any(purl.startswith("pkg:pypi/pillow@") for purl in purls)
    SBOM.mkdir(exist_ok=True)
    (SBOM / f"{target}.cdx.json").write_text(text)
    print(f"sbom/{target}.cdx.json: {len(components)} components", flush=True)


def test_what_compilers_need_is_left_out(docker: Engine, images: dict[str, str]) -> None:
    """145 MB of torch; but what starts its shared memory's manager stays."""
    for target in ("builder", "cpu"):
        torch = "$(python -c 'import torch; print(torch.__path__[0])')"
        done = docker(
            "run", "--rm", "--entrypoint=sh", images[target], "-c", f"ls {torch} {torch}/bin"
        )
        assert {"lib", "torch_shm_manager"} <= set(done.stdout.split())
        assert not {"include", "test"} & set(done.stdout.split())


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_same_input_makes_the_same_files(
    docker: Engine, images: dict[str, str], built_on: Bases, target: str
) -> None:
    """Built again without a cache. Times of files are left out: no Dockerfile can set them."""
    again = f"{TOKEN}:again"
    build(docker, built_on, target, again, "--no-cache")
    first, second = (
        set(inside(docker, image, "inside_files.py", "--user=0").splitlines())
        for image in (images[target], again)
    )
    docker("rmi", again)
    assert len(first) > 10_000
    assert sorted(first ^ second)[:20] == []
