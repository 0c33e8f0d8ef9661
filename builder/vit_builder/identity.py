"""The version of a model: one number derived from everything that determines its outputs."""

import hashlib
import json
from dataclasses import asdict

from .checkpoint import Checkpoint
from .repository import Settings

# To be increased if a change to the builder or the template changes the outputs for the same
# checkpoint by more than rounding.
ANSWERS = 1


def version(checkpoint: Checkpoint, settings: Settings, calibration: str = "") -> int:
    """Return Triton's `model_version` for all models of a repository: below 2^48, which JavaScript
    and JSON represent exactly, and above 1, which is the template's.

    It is a digest of the weights (in any layout and file format), the labels, the colour
    statistics, the precisions, K and how JPEGs are decoded. So it is the same on every machine,
    whatever the file's name, the device and the limits. It identifies a model, and has no order: a
    later build may have a smaller one.

    Args:
        calibration: digest of the images that int8 was calibrated with.
    """
    facts = {
        "answers": ANSWERS,
        "network": asdict(checkpoint.config),
        "rgb": [checkpoint.rgb_mean, checkpoint.rgb_std],
        "labels": checkpoint.labels,
        "precision": [settings.precision, settings.neck_precision],
        "top_k": settings.top_k,
        "fast_jpeg": settings.fast_jpeg,
    }
    if calibration:
        facts["calibration"] = calibration
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.state.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().astype("<f4", copy=False).data)
    return 2 + int.from_bytes(digest.digest()[:6], "big") % (2**48 - 2)
