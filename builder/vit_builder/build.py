"""All steps of a build: calibrate, trace, fill the repository, verify it, report."""

import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from . import export, hub, identity, images, int8, repository, verify
from .checkpoint import Checkpoint
from .images import Calibration
from .int8 import Quantised
from .repository import Settings


def build(
    model: Checkpoint,
    settings: Settings,
    output: Path,
    sha256: str = "",
    calibrate: Path | None = None,
) -> verify.Agreement:
    """Trace `model`, write the repository and verify it; `output` is replaced only at the end.

    Args:
        calibrate: a folder of images to calibrate int8 with, one in four of which is held out for
            verification; by default, the photos that ship with the builder.

    Raises:
        CalibrationError, RepositoryError, VerificationError: the message says what is wrong.
    """
    size, precision = model.config.image_size, settings.precision
    calibration = images.calibration(calibrate, size) if precision == "int8" else None
    with repository.replacing(output) as folder:
        number = identity.version(model, settings, calibration.digest() if calibration else "")
        layers = _calibrate(model, calibration) if calibration else {}
        say(f"Tracing {model.name} in {precision} (model version {number}) …")
        traced = export.trace(
            *(model, precision, settings.top_k, settings.device, settings.neck_precision),
            {name: layers[name] for name in layers.keys() - _unsuited(layers)},
        )
        repository.fill(folder, model, traced, settings, sha256, number)
        pixels = calibration.held_apart if calibration else images.pixels(images.SHIPPED, size)
        say(f"Comparing the written model.pt with the fp32 network on {_count(pixels)} …")
        file = repository.model_file(folder)
        agreement = verify.compare(file, model, settings.top_k, settings.max_batch_size, pixels)
        limits = verify.limits(precision, settings.neck_precision)
        print(verify.table(agreement, limits, precision), flush=True)
        verify.check(agreement, limits, precision)
        report = {
            "model": model.name,
            "weights": "trained" if model.trained else "random",
            "weights_sha256": sha256,
            "model_version": str(number),  # as in responses
            # Of the files that must be from the same build: vit-server checks them.
            "sha256": {name: hub.file_sha256(folder / name) for name in repository.built(number)},
            "network": asdict(model.config),
            **asdict(settings),
            "agreement": asdict(agreement),
            "limits": asdict(limits),
            **({"int8": _of_int8(calibration, layers)} if calibration else {}),
            "versions": {name: version(name) for name in ("vit-builder", "torch", "pillow")},
        }
        (folder / repository.REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return agreement


def _calibrate(model: Checkpoint, calibration: Calibration) -> dict[str, Quantised]:
    """Calibrate all layers for int8, and report those that stay in fp32."""
    say(
        f"Calibrating int8 with {calibration.source}: {_count(calibration.images)}, and "
        f"{len(calibration.held_apart)} held out …"
    )
    if not int8.is_exact():
        say("This CPU has no VNNI: the int8 weights run, and are compared, in fp32 here.")
    layers = export.quantise(model, calibration.images)
    for name in _unsuited(layers):
        say(f"{name} stays in fp32: its error in int8 would be {layers[name].error:.1%}")
    return layers


def _of_int8(calibration: Calibration, layers: dict[str, Quantised]) -> dict[str, object]:
    """Return the report's section on int8."""
    return {
        "calibrated_with": calibration.source,
        "images": len(calibration.images),
        "held_apart": len(calibration.held_apart),
        "layers_in_fp32": _unsuited(layers),
        "layer_errors": {name: round(layer.error, 5) for name, layer in layers.items()},
    }


def _unsuited(layers: dict[str, Quantised]) -> list[str]:
    return [name for name, layer in layers.items() if not layer.error <= int8.MAX_ERROR]


def _count(images: Tensor) -> str:
    return f"{len(images)} image{'s' if len(images) > 1 else ''}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
