"""An image's software bill of materials, as CycloneDX JSON."""

import uuid
from pathlib import Path
from typing import Any

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from .engine import TOKEN, Engine

HERE = Path(__file__).parent


def inside(docker: Engine, image: str, script: str, *flags: str) -> str:
    """What one of the scripts inside_*.py prints in an image."""
    words = ("run", "--rm", "--interactive", f"--label={TOKEN}=1", "--network=none")
    command = (*words, *flags, "--entrypoint=python3", image, "-")
    return docker(*command, input=(HERE / script).read_text()).stdout


def sbom(name: str, digest: str, found: dict[str, Any]) -> str:
    """CycloneDX 1.6 of an image.

    Args:
        name: of the image.
        digest: its id, sha256:…
        found: what inside_packages.py has said.
    """
    distro = f"{found['system']}-{found['release']}"
    purls = [
        PackageURL(kind, None, *words) for kind in ("pypi", "generic") for words in found[kind]
    ]
    for package, version, arch, source, source_version in found["deb"]:
        # Advisories are about source packages.
        more = {"arch": arch, "distro": distro, "upstream": f"{source}@{source_version}"}
        purls.append(PackageURL("deb", found["system"], package, version, more))
    components = [_component(purl) for purl in purls]
    bom = Bom(components=components, serial_number=uuid.uuid5(uuid.NAMESPACE_OID, digest))
    image = Component(type=ComponentType.CONTAINER, name=name, version=digest, bom_ref=digest)
    bom.metadata.component = image
    bom.register_dependency(image, components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _component(purl: PackageURL) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        name=purl.name,
        version=purl.version,
        purl=purl,
        bom_ref=purl.to_string(),
    )


def faults(text: str) -> str:
    """What CycloneDX' own schema has against it; nothing where it is right."""
    return str(JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) or "")
