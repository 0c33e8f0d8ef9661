"""inference.proto matches Triton's, and the generated module is up to date."""

import sys
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2, service_pb2
from vit_client import _inference, _protocol

sys.path.append(str(Path(__file__).parents[2] / "client" / "tools"))
import make_protocol


def test_the_compiled_file_is_up_to_date() -> None:
    source = Path(_inference.__file__).read_text()
    assert source == make_protocol.generated(), "run client/tools/make_protocol.py"


def test_every_field_is_tritons() -> None:
    """Field numbers and types of every message, and the methods, equal tritonclient's."""
    ours = _protocol._pool.FindFileByName("inference.proto")
    theirs = {
        **model_config_pb2.DESCRIPTOR.message_types_by_name,
        **service_pb2.DESCRIPTOR.message_types_by_name,
    }
    for name, message in ours.message_types_by_name.items():
        assert_same(message, theirs[name])
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in ours.services_by_name["GRPCInferenceService"].methods:
        like = methods[method.name]
        assert method.full_name == like.full_name
        assert method.input_type.full_name == like.input_type.full_name
        assert method.output_type.full_name == like.output_type.full_name


def assert_same(message: Any, like: Any) -> None:
    assert message.full_name == like.full_name
    for field in message.fields:
        other = like.fields_by_name[field.name]
        for what in ("number", "type", "is_repeated"):
            assert getattr(field, what) == getattr(other, what), (field.full_name, what)
        assert (field.containing_oneof is None) == (other.containing_oneof is None)
    for nested in message.nested_types:
        assert_same(nested, like.nested_types_by_name[nested.name])
