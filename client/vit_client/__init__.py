"""Classify, embed and map images with a vision transformer served by NVIDIA Triton.

    from vit_client import Client

    with Client("localhost:8001") as client:
        client.classify("cat.jpg")  # [Prediction(label, index, score), …]
        client.embed(["a.jpg", "b.jpg"])  # float32 [2, D]
        client.features("cat.jpg")["neck"]  # float32 [D, h, w]
        client.analyze("cat.jpg")  # predictions and embedding of one forward pass
        for item in client.stream(paths, task="embed", on_error="return"):
            ...

`AsyncClient` has the same methods, awaited. All errors are in `vit_client.errors`.
"""

__version__ = "0.1.0"

from ._async import AsyncClient
from ._sync import Client
from .errors import (
    AccessDenied,
    BadImage,
    BadImages,
    ClientClosed,
    ConfigurationError,
    DeadlineExceeded,
    InvalidRequest,
    ModelChanged,
    ModelNotServed,
    Overloaded,
    ServerError,
    Unavailable,
    VitClientError,
)
from .types import Analysis, Features, Health, ImageLike, Item, Model, Prediction

__all__ = [
    "AccessDenied",
    "Analysis",
    "AsyncClient",
    "BadImage",
    "BadImages",
    "Client",
    "ClientClosed",
    "ConfigurationError",
    "DeadlineExceeded",
    "Features",
    "Health",
    "ImageLike",
    "InvalidRequest",
    "Item",
    "Model",
    "ModelChanged",
    "ModelNotServed",
    "Overloaded",
    "Prediction",
    "ServerError",
    "Unavailable",
    "VitClientError",
    "__version__",
]
