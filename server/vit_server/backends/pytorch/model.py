"""Triton's `pytorch` backend in Python, for the embedded server.

The nvidia-pytriton wheel has no C++ LibTorch backend. This folder takes its place: a Python-based
backend (https://github.com/triton-inference-server/python_backend) that runs the same model.pt
under the same config.pbtxt. Inputs are bound by order; an output's name ends in `__index`.
"""

import atexit
import ctypes
import json
import os
import traceback
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from pulse import Pulse, now


class TritonPythonModel:
    """On a CPU each core has images of its own, and gets the next ones as soon as it is done.

    So no core waits for another: neither at every layer, as OpenMP's threads do, nor at the end of
    a batch, and what `preprocess` takes from one core does not stop the rest. A request that is
    alone has all cores. On a GPU a batch runs as it comes.
    """

    def initialize(self, args):
        keep_memory()
        config = json.loads(args["model_config"])
        self.input = config["input"][0]["name"]
        self.outputs = {
            out["name"]: int(out["name"].rpartition("__")[2]) for out in config["output"]
        }
        on_gpu = args["model_instance_kind"] == "GPU" and torch.cuda.is_available()
        if os.environ.get("VIT_DEVICE") == "cuda" and not on_gpu:
            raise pb_utils.TritonModelException(
                f"the model repository is built for a GPU, and torch {torch.__version__} sees none"
            )
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
        self.under_way = set()  # groups that the pool has
        self.try_out(config["input"][0])
        self.pulse = Pulse()

    def try_out(self, config):
        """Raise an error where the file does not do what its config says.

        Triton's own warm-up would find it too, and may then crash while other models still load.
        """
        dtype = pb_utils.triton_string_to_numpy(config["data_type"])
        try:
            batch = np.zeros((1, *map(int, config["dims"])), dtype)
            outputs = self.forward(torch.from_numpy(batch).to(self.device))
            together([outputs], max(self.outputs.values()))
        except Exception as e:
            raise pb_utils.TritonModelException(f"the network failed: {reason(e)}") from None

    def execute(self, requests):
        """The responses; or None where the cores send them, when one of them wants the next batch.

        That is allowed since Triton 24.06 (python_backend's README, "execute").
        """
        begun = now()
        responses = None
        self.under_way = {work for work in self.under_way if not work.done()}
        if self.cores == 1 or (len(requests) == 1 and not self.under_way):
            responses = self.respond(Group(requests, self.input), self.on_all_cores)
        else:
            shares = [requests[core :: self.cores] for core in range(self.cores)]
            groups = [Group(share, self.input) for share in shares if share]
            with or_end():  # Triton would answer again what a core has answered
                for group in groups:
                    self.under_way.add(self.pool.submit(self.send, group, begun))
                while len(self.under_way) >= self.cores:
                    self.under_way = wait(self.under_way, return_when=FIRST_COMPLETED).not_done
        self.pulse.check(begun)
        return responses

    def send(self, group, begun):
        """One core's work."""
        with or_end():  # nobody else would answer
            responses = self.respond(group, self.on_one_core)
            for sender, response in zip(group.senders, responses, strict=True):
                self.pulse.check(begun)
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def respond(self, group, run):
        """A response to each request of the group; errors where the network fails."""
        try:
            parts = run(torch.from_numpy(group.pixels))
            # Copy to the host only what somebody asked for.
            asked = {name for names in group.names for name in names}
            on_host = {name: together(parts, self.outputs[name]) for name in asked}
        except Exception as e:
            pb_utils.Logger.log_error(f"the network failed: {e}")
            error = pb_utils.TritonError(f"the network failed: {reason(e)}")
            return [pb_utils.InferenceResponse(error=error) for _ in group.rows]

        responses, start = [], 0
        for rows, names in zip(group.rows, group.names, strict=True):
            tensors = [pb_utils.Tensor(name, on_host[name][start : start + rows]) for name in names]
            responses.append(pb_utils.InferenceResponse(tensors))
            start += rows
        return responses

    def on_all_cores(self, pixels):
        """The module's outputs, in parts of the rows; one image has all of OpenMP's threads."""
        if self.cores == 1 or len(pixels) == 1:
            return [self.forward(pixels.to(self.device))]
        return list(self.pool.map(self.forward, pixels.tensor_split(min(self.cores, len(pixels)))))

    def on_one_core(self, pixels):
        return [self.forward(pixels)]

    @torch.inference_mode()
    def forward(self, pixels):
        with torch.jit.optimized_execution(self.optimize):
            return self.module(pixels)

    def finalize(self):
        self.pool.shutdown()
        # Python's own teardown takes half a second, and Triton unloads one process after the other.
        atexit.register(os._exit, 0)


class Group:
    """Requests that run together: their rows, and what each of them asked for."""

    def __init__(self, requests, name):
        inputs = [pb_utils.get_input_tensor_by_name(r, name).as_numpy() for r in requests]
        # A copy: Triton takes the requests' own memory back when execute() returns.
        self.pixels = np.concatenate(inputs)
        self.rows = [len(rows) for rows in inputs]
        self.names = [request.requested_output_names() for request in requests]
        self.senders = [request.get_response_sender() for request in requests]


@contextmanager
def or_end():
    """A failure in here would leave callers without an answer; a process that ends is noticed."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def reason(error):
    """Of TorchScript's traceback the last line."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


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
