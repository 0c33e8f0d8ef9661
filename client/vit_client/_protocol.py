"""The messages and methods of inference.proto.

They are in their own descriptor pool, so that a program can use this client together with any
version of tritonclient or KServe's package, which register the same names for the whole process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from ._inference import FILE_DESCRIPTOR

_pool = DescriptorPool()
_pool.AddSerializedFile(bytes.fromhex(FILE_DESCRIPTOR))
_service = _pool.FindServiceByName("inference.GRPCInferenceService")


def _message(name: str) -> Any:
    return GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))


ModelConfigRequest = _message("ModelConfigRequest")
ModelInferRequest = _message("ModelInferRequest")
ServerLiveRequest = _message("ServerLiveRequest")
ServerMetadataRequest = _message("ServerMetadataRequest")
ServerReadyRequest = _message("ServerReadyRequest")


def methods(channel: Any) -> dict[str, Callable[..., Any]]:
    """The server's methods on a channel, by name."""
    return {
        method.name: channel.unary_unary(
            f"/{_service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        for method in _service.methods
    }
