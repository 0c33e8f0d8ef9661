"""The version of a model: one number for whatever decides its answers."""

import hashlib
import json
from dataclasses import asdict

from .checkpoint import Checkpoint
from .repository import Settings

# To be raised where a change of the builder or the template changes what the same checkpoint
# answers, by more than rounding.
ANSWERS = 1


def version(checkpoint: Checkpoint, settings: Settings, calibration: str = "") -> int:
    """Triton's `model_version` for all models of a repository: below 2^48, which JavaScript and
    JSON have exactly, and above 1, which is the template's.

    It is a digest of the weights (in whichever layout and kind of file they came), the labels, the
    colour statistics, the precisions, K and how JPEGs are decoded; and so the same on every
    machine, whatever the file's name, the device and the limits. It tells models apart, and has no
    order: a later build may have a smaller one.

    Args:
        calibration: digest of the images that decided int8's scales.
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
