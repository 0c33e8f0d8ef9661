"""Decode and resize: one encoded image file a row in, uint8 pixels [H, W, 3] out.

The pixels are those the network was trained on (birder's transform), bit for bit: `convert("RGB")`
(alpha dropped, EXIF orientation not applied), then straight to H x W by Pillow's BICUBIC.
Normalising happens inside `vit`.
"""

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image, UnidentifiedImageError

# What Pillow may open. Not all it can: EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# gRPC carries error messages in headers (8 KiB by default), so a message has bounds.
MAX_REASON, MAX_MESSAGE = 200, 4000


class BadImage(Exception):
    """A row that has no pixels; the message is for the person who sent it."""


def decode(data, height, width, max_pixels):
    """Encoded file (bytes) -> uint8 array [height, width, 3]. Raises BadImage."""
    if not data:
        raise BadImage("it is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadImage(f"{image.width}x{image.height} is over {max_pixels} pixels")
            return np.asarray(resize(image.convert("RGB"), width, height))
    except BadImage:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise BadImage(f"{len(data)} bytes that are not an image ({known})") from None
    except Exception as e:  # a broken file raises nearly anything in Pillow's decoders
        raise BadImage(f"it cannot be decoded: {str(e) or type(e).__name__}"[:MAX_REASON]) from e


def resize(image, width, height):
    """Pillow's bicubic, with the same pixels in every version of Pillow.

    It resizes one axis after the other and rounds in between. Which axis is first makes up to 8
    levels of difference in tall images, and changed in Pillow 13, whose choice this is.
    """
    vertical_first = image.height > height and image.height - height > 2 * (image.width - width)
    between = (image.width, height) if vertical_first else (width, image.height)
    bicubic = Image.Resampling.BICUBIC
    return image.resize(between, bicubic).resize((width, height), bicubic)


class TritonPythonModel:
    """Answers each request of a dynamic batch on its own: a bad file costs no neighbour."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.height, self.width, _ = (int(d) for d in config["output"][0]["dims"])
        self.max_pixels = int(config["parameters"]["max_image_pixels"]["string_value"])
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which only warns up to twice of it
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def execute(self, requests):
        rows = [pb_utils.get_input_tensor_by_name(r, "image").as_numpy()[:, 0] for r in requests]
        # Start every row of every request before the first answer is put together.
        started = [[self.pool.submit(self.decode, data) for data in request] for request in rows]
        return [self.answer(futures) for futures in started]

    def decode(self, data):
        return decode(data, self.height, self.width, self.max_pixels)

    def answer(self, futures):
        """One request's rows -> its response: all pixels, or an error that names the bad rows."""
        pixels = np.empty((len(futures), self.height, self.width, 3), np.uint8)
        bad = []
        for row, future in enumerate(futures):
            try:
                pixels[row] = future.result()
            except BadImage as e:
                bad.append(f"image[{row}]: {e}")
        if bad:
            error = pb_utils.TritonError(shorten(bad), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])

    def finalize(self):
        self.pool.shutdown()


def shorten(lines):
    """As many whole lines as fit into MAX_MESSAGE characters, and how many did not."""
    message = lines[0]
    for i, line in enumerate(lines[1:], start=1):
        if len(message) + len(line) > MAX_MESSAGE:
            return f"{message}\n(and {len(lines) - i} more)"
        message += "\n" + line
    return message
