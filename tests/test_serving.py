"""The wire contract, end to end: real tritonserver, real gRPC, good and bad requests."""

import io
import json
import queue
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import PHOTOS, Rows, Server, golden_image, png
from google.protobuf import text_format
from PIL import Image
from reliability.files import png as png_of
from tritonclient.grpc import InferenceServerClient, InferInput, model_config_pb2
from tritonclient.utils import InferenceServerException

CONTRACT = {
    "classify": {"scores": (12,), "indices": (12,), "labels": (12,)},
    "probabilities": {"probabilities": (12,)},
    "embed": {"embedding": (64,)},
    "features": {"neck": (64, 4, 4)},
}
CONTRACT["analyze"] = CONTRACT["classify"] | CONTRACT["probabilities"] | CONTRACT["embed"]
CONTRACT["everything"] = CONTRACT["analyze"] | CONTRACT["features"]
PHOTO = (PHOTOS / "coffee.jpg").read_bytes()


@pytest.fixture(autouse=True)
def _alive_and_right_afterwards(tiny_server: Server) -> Iterator[None]:
    """Whatever a test does to the server, the next caller gets the same answer as before."""
    before = tiny_server.infer("embed", "image", [PHOTO])["embedding"]
    yield
    after = tiny_server.infer("embed", "image", [PHOTO])["embedding"]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("ensemble", list(CONTRACT))
def test_ensemble_answers_a_batch(tiny_server: Server, ensemble: str, size: int) -> None:
    names = ["photo-coffee.jpg", "gray16.png", "cmyk.jpg", "palette.gif", "lossy.webp"]
    files = [golden_image(names[i % len(names)]).read_bytes() for i in range(size)]
    answer = tiny_server.infer(ensemble, "image", files)
    shapes = {name: array.shape for name, array in answer.items()}
    assert shapes == {name: (size, *shape) for name, shape in CONTRACT[ensemble].items()}
    for i in range(size):  # each row is what it would be alone, in its place
        alone = tiny_server.infer(ensemble, "image", [files[i]])
        for name, array in alone.items():
            if array.dtype == np.float32:
                np.testing.assert_allclose(answer[name][i], array[0], atol=1e-5, rtol=0)
            else:
                np.testing.assert_array_equal(answer[name][i], array[0])


def test_answers_agree_with_each_other(tiny_server: Server) -> None:
    neck = tiny_server.infer("features", "image", [PHOTO])["neck"]
    embedding = tiny_server.infer("embed", "image", [PHOTO])["embedding"]
    np.testing.assert_allclose(neck.mean((2, 3)), embedding, atol=1e-6, rtol=0)
    probabilities = tiny_server.infer("probabilities", "image", [PHOTO])["probabilities"]
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    best = tiny_server.infer("classify", "image", [PHOTO])
    assert (np.diff(best["scores"]) <= 0).all()
    np.testing.assert_array_equal(best["scores"][0], probabilities[0][best["indices"][0]])
    everything = tiny_server.infer("everything", "image", [PHOTO])
    alone = {"neck": neck, "embedding": embedding, "probabilities": probabilities, **best}
    for name, array in alone.items():
        np.testing.assert_array_equal(everything[name], array)


@pytest.mark.parametrize("ensemble", ["analyze", "everything"])
@pytest.mark.parametrize("names", [["embedding"], ["labels", "embedding"], ["probabilities"]])
def test_a_request_gets_the_outputs_that_it_names(
    tiny_server: Server, ensemble: str, names: list[str]
) -> None:
    answer = tiny_server.infer(ensemble, "image", [PHOTO] * 2, outputs=names)
    whole = tiny_server.infer("everything", "image", [PHOTO] * 2)
    assert sorted(answer) == sorted(names)
    for name in names:
        np.testing.assert_array_equal(answer[name], whole[name])


def test_pixels_can_go_to_vit_alone(tiny_server: Server) -> None:
    pixels = tiny_server.infer("preprocess", "image", [PHOTO])["pixels"]
    answer = tiny_server.infer("vit", "pixels", pixels)
    assert {name: (array.dtype.name, array.shape[1:]) for name, array in answer.items()} == {
        "probabilities__0": ("float32", (12,)),
        "embedding__1": ("float32", (64,)),
        "neck__2": ("float32", (64, 4, 4)),
        "top_scores__3": ("float32", (12,)),
        "top_indices__4": ("int32", (12,)),
    }


@pytest.mark.parametrize(
    ("model", "name", "rows", "datatype", "reason"),
    [
        ("embed", "image", np.zeros((1, 2), np.object_), "BYTES", "unexpected shape"),
        ("embed", "image", np.zeros((1, 1), np.float32), "", "data-type"),
        ("embed", "picture", [PHOTO], "", "unexpected inference input 'picture'"),
        ("embed", "image", [PHOTO] * 17, "", "batch-size must be <= 16"),
        ("vit", "pixels", np.zeros((1, 64, 63, 3), np.uint8), "", "unexpected shape"),
        ("vit", "pixels", np.zeros((17, 64, 64, 3), np.uint8), "", "batch-size must be <= 16"),
        ("postprocess", "top_scores", np.zeros((1, 12), np.float32), "", "expected 2 inputs"),
    ],
)
def test_wrong_request_is_refused(
    tiny_server: Server, model: str, name: str, rows: Rows, datatype: str, reason: str
) -> None:
    if datatype == "BYTES":
        rows = np.full((1, 2), PHOTO, np.object_)
    with pytest.raises(InferenceServerException) as raised:
        tiny_server.infer(model, name, rows, datatype)
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert reason in raised.value.message()


def test_unknown_model_is_not_found(tiny_server: Server) -> None:
    with pytest.raises(InferenceServerException, match="unknown model: 'resnet'") as raised:
        tiny_server.infer("resnet", "image", [PHOTO])
    assert raised.value.status() == "StatusCode.NOT_FOUND"


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


POISON = {
    "empty": (b"", "it is empty"),
    "text": (b"hello, world", "12 bytes that are not an image"),
    "truncated jpeg": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "truncated png": (png(np.zeros((64, 64, 3), np.uint8))[:-40], "cannot be decoded"),
    "header only": (PHOTO[:20], "not an image|cannot be decoded"),
    "bomb": (png_of(60_000, 60_000, 1, 0, bytes(7501)), "60000x60000 is over 110000000 pix"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("kind", list(POISON))
def test_poison_is_named_with_its_reason(tiny_server: Server, kind: str) -> None:
    data, reason = POISON[kind]
    with pytest.raises(InferenceServerException, match=rf"image\[0\]: .*({reason})") as raised:
        tiny_server.infer("classify", "image", [data])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_phones_largest_photo(tiny_server: Server) -> None:
    """50 and 108 megapixels."""
    small, *large = (
        encoded(Image.new("RGB", size, (200, 100, 50)), "JPEG")
        for size in ((16, 16), (8160, 6144), (12_032, 9_024))
    )
    colour = Image.open(io.BytesIO(small)).getpixel((0, 0))
    for photo in large:
        pixels = tiny_server.infer("preprocess", "image", [photo])["pixels"]
        np.testing.assert_array_equal(pixels, np.broadcast_to(colour, pixels.shape))


def test_every_poisoned_row_of_a_request_is_named(tiny_server: Server) -> None:
    with pytest.raises(InferenceServerException) as raised:
        tiny_server.infer("embed", "image", [PHOTO, b"", PHOTO, b"text"])
    lines = raised.value.message().split("image[")[1:]
    assert [line[:2] for line in lines] == ["1]", "3]"]


def test_poison_between_good_requests_costs_them_nothing(tiny_server: Server) -> None:
    """Requests that Triton puts into one dynamic batch are answered each on its own."""
    good = tiny_server.infer("embed", "image", [PHOTO])["embedding"]
    files = [PHOTO if i % 3 else b"poison" for i in range(60)]
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    with InferenceServerClient(tiny_server.url) as client:
        executions = executed(client, "preprocess")
        for i, data in enumerate(files):
            tensor = InferInput("image", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[data]], np.object_))
            client.async_infer(
                "embed", [tensor], lambda result, error, i=i: answers.put((i, result, error))
            )
        for _ in files:
            i, result, error = answers.get(timeout=60)
            if i % 3:
                np.testing.assert_allclose(result.as_numpy("embedding"), good, atol=1e-5, rtol=0)
            else:
                assert error.status() == "StatusCode.INVALID_ARGUMENT"
                assert "image[0]: 6 bytes that are not an image" in error.message()
        assert executed(client, "preprocess") - executions < len(files), "nothing was batched"


def executed(client: InferenceServerClient, model: str) -> int:
    """How many batches a model has run."""
    (statistics,) = client.get_inference_statistics(model).model_stats
    return int(statistics.execution_count)


def test_a_long_list_of_bad_rows_fits_into_grpcs_headers(tiny_server: Server) -> None:
    with pytest.raises(InferenceServerException) as raised:
        tiny_server.infer("embed", "image", [b"\xff\xd8" + bytes([i]) * 5000 for i in range(16)])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "image[15]" in raised.value.message()


def test_postprocess_refuses_indices_that_are_no_class(tiny_server: Server) -> None:
    scores = InferInput("top_scores", [1, 12], "FP32")
    scores.set_data_from_numpy(np.zeros((1, 12), np.float32))
    indices = InferInput("top_indices", [1, 12], "INT32")
    indices.set_data_from_numpy(np.full((1, 12), 12, np.int32))
    with (
        InferenceServerClient(tiny_server.url) as client,
        pytest.raises(InferenceServerException, match=r"top_indices must be in \[0, 12\)"),
    ):
        client.infer("postprocess", [scores, indices])


def test_plain_http_answers_too(tiny_server: Server) -> None:
    """Triton's binary extension: a JSON header, then the raw rows."""
    row = len(PHOTO).to_bytes(4, "little") + PHOTO
    binary = {"binary_data_size": len(row)}
    header = json.dumps(
        {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": binary}]}
    ).encode()
    request = urllib.request.Request(
        f"{tiny_server.http_url}/v2/models/embed/infer",
        header + row,
        {"Inference-Header-Content-Length": str(len(header))},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)["outputs"][0]
    wanted = tiny_server.infer("embed", "image", [PHOTO])["embedding"]
    np.testing.assert_allclose([answer["data"]], wanted, atol=1e-6, rtol=0)


def test_apis_that_nobody_needs_are_closed(tiny_server: Server) -> None:
    with InferenceServerClient(tiny_server.url) as client:
        for call in (
            lambda: client.unload_model("vit"),
            lambda: client.get_model_repository_index(),
            lambda: client.register_system_shared_memory("x", "/x", 8),
            lambda: client.update_log_settings({"log_verbose_level": 9}),
            lambda: client.update_trace_settings(settings={"trace_level": "TIMESTAMPS"}),
        ):
            with pytest.raises(InferenceServerException, match="protocol is restricted"):
                call()


def test_template_is_what_triton_calls_complete() -> None:
    """Every file parses as a ModelConfig, and is named as its folder."""
    template = PHOTOS.parent / "model_repository"
    for path in template.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        assert config.name == path.parent.name
