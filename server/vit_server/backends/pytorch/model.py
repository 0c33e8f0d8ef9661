"""Triton's `pytorch` backend in Python, for the embedded server.

The nvidia-pytriton wheel has no C++ LibTorch backend. This folder replaces it: a Python-based
backend (https://github.com/triton-inference-server/python_backend) that runs the same model.pt
with the same config.pbtxt. Inputs are bound by order; an output's name ends in `__index`.
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
    """Runs model.pt: on a CPU each core works on its own images, on a GPU whole batches run.

    On a CPU a core gets its next images as soon as it is done. No core waits for another, neither
    at every layer, as OpenMP threads do, nor at the end of a batch, and when `preprocess` takes one
    core the others continue. A single request uses all cores.
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
        self.under_way = set()  # groups in the pool
        self.try_out(config["input"][0])
        self.pulse = Pulse()

    def try_out(self, config):
        """Raise TritonModelException if the file does not do what its config says.

        Triton's own warm-up would find it too, but may then crash while other models still load.
        """
        dtype = pb_utils.triton_string_to_numpy(config["data_type"])
        try:
            batch = np.zeros((1, *map(int, config["dims"])), dtype)
            outputs = self.forward(torch.from_numpy(batch).to(self.device))
            together([outputs], max(self.outputs.values()))
        except Exception as e:
            raise pb_utils.TritonModelException(f"the network failed: {reason(e)}") from None

    def execute(self, requests):
        """Return the responses, or None if the cores send them.

        In that case it returns as soon as a core is free for the next batch. Returning None is
        allowed since Triton 24.06 (python_backend's README, "execute").
        """
        begun = now()
        responses = None
        self.under_way = {work for work in self.under_way if not work.done()}
        if self.cores == 1 or (len(requests) == 1 and not self.under_way):
            responses = self.respond(Group(requests, self.input), self.on_all_cores)
        else:
            shares = [requests[core :: self.cores] for core in range(self.cores)]
            groups = [Group(share, self.input) for share in shares if share]
            with or_end():  # after an exception Triton would answer again what a core has answered
                for group in groups:
                    self.under_way.add(self.pool.submit(self.send, group, begun))
                while len(self.under_way) >= self.cores:
                    self.under_way = wait(self.under_way, return_when=FIRST_COMPLETED).not_done
        self.pulse.check(begun)
        return responses

    def send(self, group, begun):
        """Run a group on one core and send its responses."""
        with or_end():  # otherwise its requests would never be answered
            responses = self.respond(group, self.on_one_core)
            for sender, response in zip(group.senders, responses, strict=True):
                self.pulse.check(begun)
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def respond(self, group, run):
        """Return a response for each request of the group; errors if the network fails."""
        try:
            parts = run(torch.from_numpy(group.pixels))
            # Copy only requested outputs to the host.
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
        """Return the module's outputs, split by rows; a single image uses all OpenMP threads."""
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
        # Python's teardown takes half a second, and Triton unloads the processes one by one.
        atexit.register(os._exit, 0)


class Group:
    """Requests that run together: their rows, and the outputs that each requested."""

    def __init__(self, requests, name):
        inputs = [pb_utils.get_input_tensor_by_name(r, name).as_numpy() for r in requests]
        # A copy: Triton reclaims the requests' memory when execute() returns.
        self.pixels = np.concatenate(inputs)
        self.rows = [len(rows) for rows in inputs]
        self.names = [request.requested_output_names() for request in requests]
        self.senders = [request.get_response_sender() for request in requests]


@contextmanager
def or_end():
    """Exit the process on any exception: it would leave requests unanswered; an exit is noticed."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def reason(error):
    """Return the last line of TorchScript's traceback."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


def together(parts, index):
    """Return one output for all rows, as an array on the host."""
    tensors = [outputs[index] for outputs in parts]
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).cpu().numpy()


def keep_memory():
    """Make malloc keep the memory that a batch frees for the next one.

    By default large tensors are mapped by the kernel page by page: a quarter of the network's time
    on a CPU. The numbers are those of mallopt(3); glibc accepts at most 32 MiB for the first.
    """
    malloc = ctypes.CDLL(None)
    malloc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    malloc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    malloc.mallopt(-2, 2**26)  # M_TOP_PAD


def _one_thread():
    """Limit OpenMP to one thread in this pool thread: the count is per calling thread."""
    torch.zeros(1).exp()  # at a thread's first use torch applies the process-wide count
    torch.set_num_threads(1)
