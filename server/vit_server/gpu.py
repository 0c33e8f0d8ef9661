"""Whether there is a GPU to use, as CUDA's driver says, and tritonserver's settings for it.

Left to itself, Triton takes the CPU where it sees no GPU: in fp16, at over a second an image, and
ready. So a repository that is built for a GPU says so (KIND_GPU), and is not served without one.
"""

import ctypes

from .tritonserver import ServerError

# All outputs of 64 images are 39 MB, and some of that is under way at once. By default there are
# 64 MiB on the GPU and 256 on the host, and what finds no place there is copied once more.
CUDA_POOL = 512 << 20
PINNED_POOL = 1 << 30
# That take requests for gRPC; two by default. Not in every Triton.
THREADS = "--grpc-infer-thread-count"


def flags(help_text: str) -> list[str]:
    """tritonserver's, for requests and answers at a GPU's rate.

    Args:
        help_text: tritonserver's own.

    Raises:
        ServerError: there is no GPU.
    """
    found = [f"--cuda-memory-pool-byte-size={gpu}:{CUDA_POOL}" for gpu in range(_count())]
    found.append(f"--pinned-memory-pool-byte-size={PINNED_POOL}")
    return [*found, f"{THREADS}=8"] if THREADS in help_text else found


def _count() -> int:
    """GPUs that this process may use."""
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
