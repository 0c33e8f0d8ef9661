"""Triton's `pytorch` backend in Python, for the embedded server.

The nvidia-pytriton wheel has no C++ LibTorch backend. This folder takes its place: a Python-based
backend (https://github.com/triton-inference-server/python_backend) that runs the same model.pt
under the same config.pbtxt. Inputs are bound by order; an output's name ends in `__index`.
"""

import ctypes
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from pulse import Pulse


class TritonPythonModel:
    def initialize(self, args):
        keep_memory()
        config = json.loads(args["model_config"])
        self.input = config["input"][0]["name"]
        self.outputs = {
            out["name"]: int(out["name"].rpartition("__")[2]) for out in config["output"]
        }
        on_gpu = args["model_instance_kind"] == "GPU" and torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(args["model_instance_device_id"])) if on_gpu else "cpu"
        )
        flag = config["parameters"].get("DISABLE_OPTIMIZED_EXECUTION", {}).get("string_value")
        self.optimize = flag != "true"
        file = config["default_model_filename"] or "model.pt"
        path = Path(args["model_repository"], args["model_version"], file)
        self.module = torch.jit.load(path, map_location=self.device).eval()
        self.cores = 1 if on_gpu else torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.cores, initializer=_one_thread)
        self.pulse = Pulse()

    def execute(self, requests):
        with self.pulse:
            return self.answer(requests)

    @torch.inference_mode()
    def answer(self, requests):
        """Run all requests as one batch; copy to the host only what somebody asked for."""
        inputs = [pb_utils.get_input_tensor_by_name(r, self.input).as_numpy() for r in requests]
        batch = torch.from_numpy(np.concatenate(inputs) if len(inputs) > 1 else inputs[0])
        parts = self.run(batch)
        asked = {name for request in requests for name in request.requested_output_names()}
        on_host = {name: together(parts, self.outputs[name]) for name in asked}

        responses, start = [], 0
        for request, rows in zip(requests, inputs, strict=True):
            stop = start + len(rows)
            names = request.requested_output_names()
            tensors = [pb_utils.Tensor(name, on_host[name][start:stop]) for name in names]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop
        return responses

    def run(self, batch):
        """The module's outputs, in parts of the rows: each core has one.

        Cores that work on images of their own do not wait for each other at every layer, as
        OpenMP's threads do, and what `preprocess` takes from one core does not stop the rest.
        A single image has all cores.
        """
        if self.cores == 1 or len(batch) == 1:
            return [self.forward(batch.to(self.device))]
        return list(self.pool.map(self.forward, batch.tensor_split(min(self.cores, len(batch)))))

    @torch.inference_mode()
    def forward(self, pixels):
        with torch.jit.optimized_execution(self.optimize):
            return self.module(pixels)

    def finalize(self):
        self.pool.shutdown()


def together(parts, index):
    """One output of all rows, on the host."""
    tensors = [outputs[index] for outputs in parts]
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).cpu().numpy()


def keep_memory():
    """What a batch gives back is kept for the next one.

    By default large tensors come from the kernel, page by page: a quarter of the network's time on
    a CPU. The numbers are those of mallopt(3); 32 MiB is the most that glibc takes for the first.
    """
    malloc = ctypes.CDLL(None)
    malloc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    malloc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    malloc.mallopt(-2, 2**26)  # M_TOP_PAD


def _one_thread():
    """OpenMP's thread count belongs to the thread that sets it."""
    torch.zeros(1).exp()  # torch sets the process's count at a thread's first use
    torch.set_num_threads(1)
