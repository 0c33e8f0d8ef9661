"""Checks for a GPU, by asking CUDA's driver, and tritonserver's settings for it.

Without a GPU, Triton would fall back to the CPU: in fp16, at over a second per image, and still
report ready. So a repository built for a GPU says so (KIND_GPU), and is not served without one.
"""

import ctypes

from .tritonserver import ServerError

# All outputs of 64 images take 39 MB, and several batches are in flight at once. The defaults are
# 64 MiB on the GPU and 256 on the host; what does not fit there is copied once more.
CUDA_POOL = 512 << 20
PINNED_POOL = 1 << 30
# Threads that accept gRPC requests; 2 by default. Not every Triton has this flag.
THREADS = "--grpc-infer-thread-count"


def flags(help_text: str) -> list[str]:
    """tritonserver's flags for requests and responses at a GPU's rate.

    Args:
        help_text: the output of tritonserver --help.

    Raises:
        ServerError: there is no GPU.
    """
    found = [f"--cuda-memory-pool-byte-size={gpu}:{CUDA_POOL}" for gpu in range(_count())]
    found.append(f"--pinned-memory-pool-byte-size={PINNED_POOL}")
    return [*found, f"{THREADS}=8"] if THREADS in help_text else found


def _count() -> int:
    """Return the number of GPUs that this process may use."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise _none("there is no NVIDIA driver (libcuda.so.1)") from None
    number, reason = ctypes.c_int(), ctypes.c_char_p()
    if code := cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)):
        cuda.cuGetErrorString(code, ctypes.byref(reason))
        raise _none(f"CUDA reports: {(reason.value or b'').decode() or f'error {code}'}")
    if not number.value:
        raise _none("CUDA finds none")
    return number.value


def _none(reason: str) -> ServerError:
    return ServerError(
        f"the model repository was built for a GPU, but {reason}; to serve it on a CPU, build it "
        "with vit-builder --device cpu"
    )
