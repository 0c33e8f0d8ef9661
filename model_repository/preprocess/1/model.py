"""Decodes and resizes: one encoded image file per row in, uint8 pixels [H, W, 3] out.

The pixels are those the network was trained on (birder's transform), bit for bit: `convert("RGB")`
(alpha dropped, EXIF orientation not applied), then directly to H x W by Pillow's BICUBIC, which
bicubic.py does in less time. `vit` normalises them.
"""

import atexit
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import triton_python_backend_utils as pb_utils
from backlog import Backlog
from decode import BadImage, Part, Room, decode
from metrics import Metrics
from PIL import Image
from pulse import Pulse, now

# Characters. gRPC sends error messages in headers, which are limited to 8 KiB by default.
MAX_MESSAGE = 4000


class TritonPythonModel:
    """Answers each request of a dynamic batch separately: a bad file does not affect the others."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.height, self.width, _ = (int(d) for d in config["output"][0]["dims"])
        parameter = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.room = Room(int(parameter["max_image_pixels"]))
        self.max_bytes = int(parameter["max_request_bytes"])
        self.fast_jpeg = parameter["fast_jpeg"] == "true"
        Image.MAX_IMAGE_PIXELS = None  # Pillow's limit only warns up to twice its value
        # Pillow's warnings: one file can cause 65,000, each stored and logged.
        warnings.simplefilter("ignore")
        metrics = os.environ.get("VIT_METRICS", "127.0.0.1:8002")
        processes = sum(group["count"] for group in config["instance_group"])
        self.backlog = Backlog(metrics, int(parameter["max_waiting_images"]), processes)
        told = parameter.get("threads", "auto")  # a number if vit-server set it
        self.threads = threads() if told == "auto" else int(told)
        self.pool = ThreadPoolExecutor(self.threads)
        self.metrics = Metrics()
        self.pulse = Pulse(self.threads)

    def execute(self, requests):
        came = now()
        self.backlog.wait()
        begun = now()
        self.metrics.note(self.metrics.held_back_seconds, begun - came)
        # Flat: a request may claim the shape [0, 1] and still contain an image.
        files = [pb_utils.get_input_tensor_by_name(r, "image").as_numpy().flat for r in requests]
        self.backlog.sent([len(batch) for batch in files])
        results = iter(self.decode_all([data for batch in files for data in batch]))
        answers = [self.answer(list(islice(results, len(batch)))) for batch in files]
        self.pulse.check(begun)
        return answers

    def decode_all(self, files):
        """Decode all rows of all requests in parallel; return pixels or an error message for each.

        This thread takes part, and each thread takes the next row as soon as it is done: a pool
        task per row would cost more, most of it holding the GIL.
        """
        results = [None] * len(files)
        left = iter(enumerate(files))

        def work():
            for row, data in left:
                results[row] = self.decode(data)

        others = [self.pool.submit(work) for _ in range(min(self.threads, len(files)) - 1)]
        work()
        for other in others:
            other.result()
        return results

    def decode(self, data):
        begun, room = now(), Part(self.room)
        try:
            if len(data) > self.max_bytes:
                over = f"{len(data)} bytes are over the limit of {self.max_bytes}"
                raise BadImage("too_many_bytes", over)
            pixels = decode(data, self.height, self.width, room, self.fast_jpeg)
        except BadImage as e:
            self.metrics.note(self.metrics.refused[e.reason])
            return str(e)
        self.metrics.note(self.metrics.decode_seconds, now() - begun)
        self.metrics.note(self.metrics.megapixels, room.seen / 1e6)
        return pixels

    def answer(self, results):
        """Return a request's response: the pixels of all rows, or an error naming the bad rows."""
        bad = [f"image[{i}]: {why}" for i, why in enumerate(results) if isinstance(why, str)]
        if bad:
            self.metrics.note(self.metrics.refused_requests)
            error = pb_utils.TritonError(shorten(bad), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        if len(results) == 1:  # the most common case, without a copy
            pixels = results[0][np.newaxis]
        else:
            pixels = np.array(results, np.uint8).reshape(-1, self.height, self.width, 3)
        return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])

    def finalize(self):
        self.pool.shutdown()
        self.metrics.close()
        # Python's teardown takes half a second, and Triton unloads the processes one by one.
        atexit.register(os._exit, 0)


def threads():
    """Return the number of threads, by OpenMP's rules as for the network.

    With a container's CPU limit it is below the number of cores. In a list the first number counts;
    the others are for nested threads.
    """
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
    """Join as many whole lines as fit into MAX_MESSAGE characters, and count those left out."""
    message = lines[0]
    for i, line in enumerate(lines[1:], start=1):
        if len(message) + len(line) > MAX_MESSAGE:
            return f"{message}\n(and {len(lines) - i} more)"
        message += "\n" + line
    return message
