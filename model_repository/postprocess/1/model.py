"""Names the classes: top-k scores and indices in, the same with their labels out."""

import atexit
import os
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from pulse import Pulse, now


class TritonPythonModel:
    def initialize(self, args):
        path = Path(args["model_repository"], args["model_version"], "labels.txt")
        # One label per line, by class index. Only "\n" ends a line: labels may contain others.
        labels = path.read_bytes().removesuffix(b"\n").split(b"\n")
        self.labels = np.array(labels, dtype=np.object_)
        self.pulse = Pulse(1)

    def execute(self, requests):
        begun = now()
        answers = [self.answer(request) for request in requests]
        self.pulse.check(begun)
        return answers

    def answer(self, request):
        scores = pb_utils.get_input_tensor_by_name(request, "top_scores").as_numpy()
        indices = pb_utils.get_input_tensor_by_name(request, "top_indices").as_numpy()
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self.labels):
            reason = f"top_indices must be in [0, {len(self.labels)})"
            error = pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("scores", scores),
                pb_utils.Tensor("indices", indices),
                pb_utils.Tensor("labels", self.labels[indices]),
            ]
        )

    def finalize(self):
        # Python's teardown takes half a second, and Triton unloads the processes one by one.
        atexit.register(os._exit, 0)
