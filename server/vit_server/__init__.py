"""The embedded server: the real tritonserver from the nvidia-pytriton wheel, on one machine."""

__version__ = "0.1.0"
