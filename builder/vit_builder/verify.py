"""Verifies the written file: model.pt against the fp32 eager network, on real photos."""

from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .export import ServedViT


class VerificationError(Exception):
    """The traced model differs from the network; nothing was replaced."""


@dataclass(frozen=True)
class Agreement:
    """Traced model against fp32 eager network: worst case over all images and batch sizes."""

    probabilities_max_diff: float
    embedding_max_diff: float
    neck_max_diff: float
    embedding_min_cosine: float
    top1_agreement: float  # share of images with the same top class
    top5_agreement: float  # mean share of the top five classes in common


# Limits by precision, several times what is measured with random weights (the hardest case: near
# ties everywhere). bf16 keeps 8 bits of mantissa and fp16 11. Top-1 has no limit below fp32,
# because two classes a thousandth apart may swap; the top five may not all change. int8 is verified
# on photos it was not calibrated with, and mostly by the cosine: the limits of the differences only
# catch gross errors, since they grow with the embedding.
LIMITS = {
    "fp32": Agreement(1e-5, 1e-4, 1e-3, 0.999999, 1.0, 0.99),
    "fp16": Agreement(5e-3, 5e-2, 0.25, 0.9999, 0.0, 0.6),
    "bf16": Agreement(5e-2, 0.25, 1.0, 0.999, 0.0, 0.6),
    "int8": Agreement(0.1, 5.0, 20.0, 0.995, 0.0, 0.4),
}


def compare(
    model_file: Path,
    checkpoint: Checkpoint,
    top_k: int,
    max_batch_size: int,
    pixels: Tensor,
    device: str = "cpu",
) -> Agreement:
    """Reload `model_file` on `device` and compare it with the fp32 network on the CPU, on uint8
    [N, H, W, 3], at batch sizes 1, N, and the largest.
    """
    reference = ServedViT(checkpoint.network(), checkpoint, "fp32", top_k).eval()
    module = torch.jit.load(str(model_file), device)  # type: ignore[no-untyped-call]
    found = []
    with torch.inference_mode():
        expected = reference(pixels)
        for size in sorted({1, min(len(pixels), max_batch_size), max_batch_size}):
            batches = -(-len(pixels) // size)
            rows = torch.tensor(list(islice(cycle(range(len(pixels))), batches * size)))
            parts = [module(pixels[part].to(device)) for part in torch.split(rows, size)]
            actual = tuple(torch.cat(outs).cpu() for outs in zip(*parts, strict=True))
            found.append(_agreement(actual, [out[rows] for out in expected]))
    return Agreement(
        **{
            field.name: (max if field.name.endswith("diff") else min)(
                getattr(agreement, field.name) for agreement in found
            )
            for field in fields(Agreement)
        }
    )


def limits(precision: str, neck_precision: str) -> Agreement:
    """Return the limits for a model in `precision` whose `neck` is sent in `neck_precision`."""
    found = LIMITS[precision]
    # Half a step of fp16 is 0.004 for numbers up to 16.
    return (
        found
        if neck_precision == "fp32"
        else replace(found, neck_max_diff=max(found.neck_max_diff, 0.01))
    )


def check(agreement: Agreement, limits: Agreement, precision: str) -> None:
    """Raise VerificationError if `agreement` is outside `limits`."""
    bounds = asdict(limits)
    hint = ""
    if precision == "int8":
        hint = (
            ". Calibrate with more images of the kind that clients will send (--calibrate FOLDER), "
            "or use fp32 or bf16"
        )
    for name, value in asdict(agreement).items():
        # Written so that a NaN fails too.
        if not (value <= bounds[name] if name.endswith("diff") else value >= bounds[name]):
            raise VerificationError(
                f"the traced {precision} model differs from the fp32 network: {name} is "
                f"{value:.6g}, the limit is {bounds[name]:.6g}{hint}"
            )


def table(agreement: Agreement, limits: Agreement, precision: str) -> str:
    """Format the agreement and its limits as a table."""
    bounds = asdict(limits)
    lines = [f"{f'{precision} against fp32 eager':<28}{'measured':>14}{'limit':>14}"]
    for name, value in asdict(agreement).items():
        sign = "<=" if name.endswith("diff") else ">="
        limit = f"{sign} {bounds[name]:g}" if bounds[name] else "none"
        lines.append(f"{name:<28}{value:>14.7g}{limit:>14}")
    return "\n".join(lines)


def _agreement(actual: tuple[Tensor, ...], expected: list[Tensor]) -> Agreement:
    probabilities, embedding, neck = (
        float((a.float() - e).abs().max()) for a, e in zip(actual[:3], expected[:3], strict=True)
    )
    cosine = torch.cosine_similarity(actual[1].double(), expected[1].double()).min()
    top1 = (actual[4][:, 0] == expected[4][:, 0]).float().mean()
    k = min(5, actual[0].shape[1])
    ours, theirs = (p.topk(k, dim=1).indices for p in (actual[0], expected[0]))
    shared = (ours[:, :, None] == theirs[:, None, :]).any(dim=2).float().mean()
    return Agreement(probabilities, embedding, neck, float(cosine), float(top1), float(shared))
