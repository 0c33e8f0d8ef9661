"""vit-builder: checkpoint -> TorchScript -> Triton model repository."""

import argparse
import signal
import sys
import time
from pathlib import Path

import torch

from . import __version__, checkpoint, export, hub, images, repository, verify
from .build import build, say
from .checkpoint import Checkpoint
from .repository import Settings

UNTRAINED = """
!! ------------------------------------------------------------------------------------------
!! The published weights could not be downloaded: {reason}
!! Building the full-size network with RANDOM weights instead. Everything works and costs the
!! same, but the labels mean nothing. To fail instead, use `--weights hub`; to use a file that
!! you already have, `--checkpoint FILE`.
!! ------------------------------------------------------------------------------------------
"""


def main() -> None:
    """Run the command."""
    parser = _parser()
    args = parser.parse_args()
    if args.precision == "int8" and args.device == "cuda":
        parser.error("--precision int8 is for CPUs: on a GPU use fp16")
    if args.calibrate and args.precision != "int8":
        parser.error("--calibrate is for --precision int8 only")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a partial build is removed
    start = time.monotonic()
    try:
        repository.check_output(args.output)  # fail before minutes of work
        if args.calibrate:
            images.images(args.calibrate)
        model, sha256 = _weights(args)
        build(model, _settings(args, model), args.output, sha256, args.calibrate)
    except (
        checkpoint.CheckpointError,
        hub.HubUnreachable,
        hub.HubError,
        images.CalibrationError,
        repository.RepositoryError,
        verify.VerificationError,
    ) as e:
        sys.exit(f"vit-builder: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    say(f"Wrote {args.output} in {time.monotonic() - start:.0f} s.")


def _weights(args: argparse.Namespace) -> tuple[Checkpoint, str]:
    if args.checkpoint:
        say(f"Loading {args.checkpoint} …")
        return checkpoint.load(args.checkpoint), hub.file_sha256(args.checkpoint)
    if args.weights != "random":
        say(f"Fetching the published weights of {hub.NAME} …")
        try:
            return hub.published()
        except hub.HubUnreachable as e:
            if args.weights == "hub":
                raise
            say(UNTRAINED.format(reason=e))
    return checkpoint.random(), ""


def _settings(args: argparse.Namespace, model: Checkpoint) -> Settings:
    device, precision = args.device, args.precision
    if device == "auto":
        on_gpu = torch.cuda.is_available() and precision != "int8"
        device = "cuda" if on_gpu else "cpu"
    if precision == "auto":
        precision, why = ("fp16", "for a GPU") if device == "cuda" else _for_this_cpu()
        say(f"Precision: {precision} ({why})")
    classes = model.config.num_classes
    if args.top_k and args.top_k > classes:
        raise checkpoint.CheckpointError(f"--top-k {args.top_k} is more than the {classes} classes")
    # Larger batches cost latency: a CPU gains nothing above 16 (measured); a GPU should be busy at
    # 64 (assumed).
    max_batch_size = args.max_batch_size or (64 if device == "cuda" else 16)
    top_k = args.top_k or min(100, classes)
    return Settings(
        precision=precision,
        max_batch_size=max_batch_size,
        top_k=top_k,
        device=device,
        neck_precision=args.neck_precision,
        fast_jpeg=args.fast_jpeg,
        max_image_pixels=args.max_image_pixels,
        max_request_bytes=args.max_request_bytes,
    )


def _for_this_cpu() -> tuple[str, str]:
    """Return bf16 if this CPU is faster in it than in fp32 for a layer of four images; and why.

    Measured, because the CPU's flags are not enough: with AMX bf16 takes a fraction of the time,
    with AVX512-BF16 alone it took 51 ms and fp32 29 (an Intel Xeon with AMX hidden). In one
    thread's CPU time, so that other load on the machine does not affect the choice.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32", "this CPU has no bf16"
    dtypes = (torch.float32, torch.bfloat16)
    layers = [torch.nn.Linear(512, 2048, dtype=dtype) for dtype in dtypes]
    tokens = [torch.ones(4 * 260, 512, dtype=dtype) for dtype in dtypes]
    times: list[list[float]] = [[], []]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(6):  # alternating; the first round is slow
            for layer, x, seconds in zip(layers, tokens, times, strict=True):
                start = time.thread_time()
                layer(x)
                seconds.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    fp32, bf16 = (min(each) * 1000 for each in times)
    precision = "bf16" if bf16 < 0.8 * fp32 else "fp32"  # a smaller gain is not worth the rounding
    return precision, f"on this CPU a layer takes {bf16:.0f} ms in bf16 and {fp32:.0f} ms in fp32"


def positive(text: str) -> int:
    """Parse an argument that must be a positive integer."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


def _batch_size(text: str) -> int:
    if (number := positive(text)) > 1024:
        raise argparse.ArgumentTypeError(
            f"{text} is more than 1024: no GPU is faster with larger batches"
        )
    return number


def _request_bytes(text: str) -> int:
    if (number := positive(text)) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text} is more than gRPC can carry (2 GB)")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vit-builder",
        description="Trace a birder ViT to TorchScript and write a complete Triton model "
        "repository.\n\n"
        "The result is compared with the fp32 network on photos before it replaces a previous\n"
        "repository, so a failed build changes nothing.",
        epilog="examples:\n"
        "  vit-builder                                # published weights, for this machine\n"
        "  vit-builder --checkpoint my.safetensors    # your own fine-tuned checkpoint\n"
        "  vit-builder --device cuda                  # for a GPU on another machine\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"vit-builder {__version__}")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="build from this birder checkpoint, .pt or .safetensors; it also defines the sizes, "
        "classes and labels",
    )
    source.add_argument(
        "--weights",
        choices=["auto", "hub", "random"],
        default="auto",
        help="hub: the published weights from the Hugging Face hub; random: untrained, to test a "
        "deployment; auto (default): hub, or random with a warning if the hub cannot be reached",
    )
    add(
        "--output",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="the model repository to create or replace (default: models)",
    )
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="device to build for: selects the layers that are fast there, and the defaults below. "
        "A repository built for cuda is served on GPUs only (default: auto, which is cuda if this "
        "machine has it)",
    )
    add(
        "--precision",
        choices=["auto", *export.DTYPES],
        default="auto",
        help="auto (default): fp16 for cuda; for a CPU bf16 if this CPU is faster with it "
        "(measured), else fp32. int8 is for CPUs with VNNI (Intel since 2019, AMD since Zen 4): "
        "the fastest there, and the least exact; see --calibrate",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FOLDER",
        help="a dozen or more images of the kind that clients will send, to choose int8's scales; "
        "one in four is held out to measure the error (default: three photos that ship with "
        "vit-builder)",
    )
    add(
        "--neck-precision",
        choices=["fp32", "fp16"],
        default="fp32",
        help="precision in which `features` is sent: fp16 halves the bytes (262 kB per image, not "
        "524 kB) and rounds to 11 bits; vit-client returns float32 in any case (default: fp32)",
    )
    add(
        "--fast-jpeg",
        action="store_true",
        help="decode large JPEGs at 1/2, 1/4 or 1/8 of their size, which halves the time for 2 "
        "megapixels. The pixels then differ from those that the network was trained on: by less "
        "than one level of 256 on average, by up to 40 at edges (default: exact)",
    )
    add(
        "--max-batch-size",
        type=_batch_size,
        metavar="N",
        help="maximum number of images in one batch (default: 16 for cpu, 64 for cuda)",
    )
    add(
        "--max-image-pixels",
        type=positive,
        default=Settings.max_image_pixels,
        metavar="N",
        help="reject larger images without decoding them. Decoding takes up to 16 bytes of memory "
        "per pixel, and each of two processes decodes up to this many pixels at once "
        "(default: %(default)s, enough for a phone's 108 megapixels)",
    )
    add(
        "--max-request-bytes",
        type=_request_bytes,
        default=Settings.max_request_bytes,
        metavar="N",
        help="reject larger image files, and larger requests over HTTP (default: %(default)s, "
        "which is 64 MiB)",
    )
    add(
        "--top-k",
        type=positive,
        metavar="K",
        help="number of classes that `classify` returns (default: 100, or all if there are fewer)",
    )
    return parser
