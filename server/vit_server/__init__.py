"""The embedded server: the real tritonserver from the nvidia-pytriton wheel, on one machine."""
