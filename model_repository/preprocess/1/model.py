"""Decode and resize: one encoded image file a row in, uint8 pixels [H, W, 3] out.

The pixels are those the network was trained on (birder's transform), bit for bit: `convert("RGB")`
(alpha dropped, EXIF orientation not applied), then straight to H x W by Pillow's BICUBIC, which
bicubic.py does in less time. Normalising happens inside `vit`.
"""

import io
import json
import os
import re
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException

import numpy as np
import triton_python_backend_utils as pb_utils
from bicubic import resize
from PIL import Image, UnidentifiedImageError
from pulse import Pulse, now

# What Pillow may open. Not all it can: EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# gRPC carries error messages in headers (8 KiB by default), so a message has bounds.
MAX_REASON, MAX_MESSAGE = 200, 4000

# The longest side that a JPEG can have. Decoding and resizing hold whole rows, of any length: a PNG
# of 50 million pixels in one row (146 kB) took 1.7 GB.
MAX_SIDE = 65535
# No encoder comes near these. libtiff stops at 100 scans of a JPEG too.
MAX_SCANS, MAX_READS = 100, 1_000_000
MAX_BMP_READS = 8_000_000  # Pillow reads a run of pixels (RLE) in two, of a byte each: some 5 s
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
OTHERS = {
    "HEIC": re.compile(rb"....ftyp(hei|hev|mif|msf)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "JPEG 2000": re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "),
    "PDF": re.compile(rb"%PDF-"),
    "SVG": re.compile(rb"\s*<(\?xml|svg)"),
}


class BadImage(Exception):
    """A row that has no pixels; the message is for the person who sent it."""


def decode(data, height, width, room, fast_jpeg=False):
    """Encoded file (bytes) -> uint8 array [height, width, 3]. Raises BadImage."""
    if not data:
        raise BadImage("it is empty (0 bytes)")
    if has_too_many_scans(data):
        raise BadImage(f"a JPEG of more than {MAX_SCANS} scans")
    try:
        reader = Reader(data)
        with Image.open(reader, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > room.pixels:
                raise BadImage(
                    f"{image.width}x{image.height} is over {room.pixels} pixels, the limit of this "
                    "server (vit-builder --max-image-pixels)"
                )
            if max(image.size) > MAX_SIDE:
                raise BadImage(f"{image.width}x{image.height} has a side of over {MAX_SIDE} pixels")
            if image.format == "BMP":
                reader.most = MAX_BMP_READS
            if fast_jpeg:  # decode at 1/2, 1/4 or 1/8, but at no less than twice what is wanted
                image.draft(None, (2 * width, 2 * height))
            with room.taken(pixels):
                image.load()
                # convert() would copy an image that is RGB already: a third of a small one's time.
                rgb = image if image.mode == "RGB" else image.convert("RGB")
                return resize(rgb, height, width)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{len(data)} bytes that are {what_else(data)}") from None
    except Exception as e:  # a broken file raises nearly anything in Pillow's decoders
        raise BadImage(f"it cannot be decoded: {str(e) or type(e).__name__}"[:MAX_REASON]) from e


def what_else(data):
    """What a file is that nothing here decodes, as far as people take it for an image."""
    for name, magic in OTHERS.items():
        if magic.match(data):
            return f"{name}: not supported by the server; convert it, or pass a PIL image"
    return f"not an image ({', '.join(FORMATS)})"


class Room:
    """Bounds the pixels that are decoded at once, and with them this process's memory.

    One image of the largest size has it all for itself, so more cores do not need more memory.
    """

    def __init__(self, pixels):
        self.pixels = self.free = pixels
        self.freed = threading.Condition()

    @contextmanager
    def taken(self, pixels):
        with self.freed:
            self.freed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.freed:
                self.free += pixels
                self.freed.notify_all()


class Reader(io.BytesIO):
    """A file that stops those who read it in tiny pieces: millions of markers, chunks, comments.

    Pillow walks through these in Python, at about 3 s a million reads.
    """

    reads, most = 0, MAX_READS

    def read(self, size=-1):
        self.reads += 1
        if self.reads > self.most:
            raise BadImage(f"it has more than {self.most} parts")
        return super().read(size)


def has_too_many_scans(data):
    """Whether a JPEG asks for far more passes over its pixels than any encoder writes.

    A scan of a few bytes can cost as much as the whole image: 2 MB took 87 s.
    """
    if not data.startswith(b"\xff\xd8") or data.count(b"\xff\xda") <= MAX_SCANS:
        return False
    # More may be in a thumbnail, or after the image. Count those that a decoder comes to.
    scans, at = 0, 2
    for _ in range(MAX_READS):
        marker = MARKER.search(data, at)
        if marker is None or marker[0] == b"\xff\xd9":
            return False
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            return True
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return True


class Backlog:
    """What waits for `vit`, by Triton's own count in its metrics.

    On a CPU `vit` is the slower one. preprocess stops while a full batch waits there; then its own
    queue, which has a limit, fills up, and Triton refuses the rest before anything is decoded.
    """

    PENDING = re.compile(rb'nv_inference_pending_request_count\{model="vit",[^}]*\} (\d+)')
    POLL = 0.01  # seconds; a look costs 0.3 ms

    def __init__(self, address, limit):
        try:
            HTTPConnection(address)
        except HTTPException:
            raise pb_utils.TritonModelException(f"VIT_METRICS={address} is not HOST:PORT") from None
        self.address, self.limit = address, limit
        self.room = 0  # requests that may be sent on before looking again

    def wait(self, requests):
        """Return when `vit` wants more, and count these requests as sent."""
        while self.room <= 0:
            self.room = self.limit - self.pending()
            if self.room <= 0:
                time.sleep(self.POLL)
        self.room -= requests

    def pending(self):
        connection = HTTPConnection(self.address, timeout=1)
        try:
            connection.request("GET", "/metrics")
            found = self.PENDING.search(connection.getresponse().read())
        except (OSError, HTTPException):  # no metrics, no limit
            return 0
        finally:
            connection.close()
        return int(found[1]) if found else 0


class TritonPythonModel:
    """Answers each request of a dynamic batch on its own: a bad file costs no neighbour."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.height, self.width, _ = (int(d) for d in config["output"][0]["dims"])
        parameter = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.room = Room(int(parameter["max_image_pixels"]))
        self.max_bytes = int(parameter["max_request_bytes"])
        self.fast_jpeg = parameter["fast_jpeg"] == "true"
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which only warns up to twice of it
        # Pillow's, about files: there can be 65,000 about one, each kept and written to the log.
        warnings.simplefilter("ignore")
        metrics = os.environ.get("VIT_METRICS", "localhost:8002")
        self.backlog = Backlog(metrics, config["max_batch_size"])
        self.pool = ThreadPoolExecutor(threads())
        self.pulse = Pulse()

    def execute(self, requests):
        self.backlog.wait(len(requests))
        begun = now()
        # Flat: a request may also say that it has the shape [0, 1], and have an image.
        files = [pb_utils.get_input_tensor_by_name(r, "image").as_numpy().flat for r in requests]
        # Start every row of every request before the first answer is put together.
        started = [[self.pool.submit(self.decode, data) for data in batch] for batch in files]
        answers = [self.answer(futures) for futures in started]
        self.pulse.check(begun)
        return answers

    def decode(self, data):
        # Returned, not raised: an exception that a future keeps holds the whole batch, in a cycle,
        # until the garbage collector happens to run.
        try:
            if len(data) > self.max_bytes:
                raise BadImage(f"{len(data)} bytes are over the limit of {self.max_bytes}")
            return decode(data, self.height, self.width, self.room, self.fast_jpeg)
        except BadImage as e:
            return str(e)

    def answer(self, futures):
        """One request's rows -> its response: all pixels, or an error that names the bad rows."""
        pixels = np.empty((len(futures), self.height, self.width, 3), np.uint8)
        bad = []
        for row, future in enumerate(futures):
            result = future.result()
            if isinstance(result, str):
                bad.append(f"image[{row}]: {result}")
            else:
                pixels[row] = result
        if bad:
            error = pb_utils.TritonError(shorten(bad), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])

    def finalize(self):
        self.pool.shutdown()


def threads():
    """As many as the network's, by OpenMP's rules: in a container with a CPU limit they are fewer
    than the cores. Of a list the first number counts; the others are for nested threads."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return len(os.sched_getaffinity(0))
    counts = [count.strip() for count in text.split(",")]
    if not all(count.isdecimal() and 0 < int(count) < 2**16 for count in counts):
        raise pb_utils.TritonModelException(
            f"OMP_NUM_THREADS={text} is neither a number of threads nor a list of such"
        )
    return int(counts[0])


def shorten(lines):
    """As many whole lines as fit into MAX_MESSAGE characters, and how many did not."""
    message = lines[0]
    for i, line in enumerate(lines[1:], start=1):
        if len(message) + len(line) > MAX_MESSAGE:
            return f"{message}\n(and {len(lines) - i} more)"
        message += "\n" + line
    return message
