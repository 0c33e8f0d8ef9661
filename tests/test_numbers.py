"""Our numbers against birder's: the network, the traced model, and both as they are served."""

from pathlib import Path

import numpy as np
import pytest
import torch
import vit_builder
from conftest import GOLDENS, Server, built, golden_image, png, reloaded, serving
from safetensors.numpy import load_file
from vit_builder.export import ServedViT, trace

TINY = ["tiny.pt", "tiny.safetensors", "tiny-legacy.pt"]
PIXELS = load_file(GOLDENS / "pixels.safetensors")
FULL = load_file(GOLDENS / "full-expected-legacy.safetensors")
PHOTOS = sorted({key.partition("/")[0] for key in FULL})
# Outputs of the wire, and how near to birder's they must be in fp32.
TOLERANCES = {"probabilities": 1e-5, "embedding": 1e-4, "neck": 1e-3}


def expected(output: str) -> np.ndarray:
    return np.stack([FULL[f"{photo}/{output}"] for photo in PHOTOS])


@pytest.mark.parametrize("file", TINY)
def test_network_gives_birders_numbers(file: str) -> None:
    golden = load_file(GOLDENS / "tiny-expected-legacy.safetensors")
    network = vit_builder.load(GOLDENS / file).network()
    with torch.inference_mode():
        logits, embedding, neck = network(torch.from_numpy(golden["input"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=5e-6, rtol=0)
    np.testing.assert_allclose(embedding, golden["embedding"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(neck, golden["neck"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("layout", ["full-expected", "full-expected-legacy"])
def test_traced_full_model_gives_birders_numbers(full_repository: Path, layout: str) -> None:
    golden = load_file(GOLDENS / f"{layout}.safetensors")
    module = torch.jit.load(built(full_repository, "vit", "model.pt"))
    with torch.inference_mode():
        outputs = module(torch.from_numpy(np.stack([PIXELS[photo] for photo in PHOTOS])))
    for output, (name, tolerance) in zip(outputs, TOLERANCES.items(), strict=False):
        # The later release has the feature map without the final norm: another thing.
        if f"{PHOTOS[0]}/{name}" in golden:
            wanted = np.stack([golden[f"{photo}/{name}"] for photo in PHOTOS])
            np.testing.assert_allclose(output, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", sorted(PIXELS))
def test_served_pixels_are_birders_bit_for_bit(full_server: Server, name: str) -> None:
    answer = full_server.infer("preprocess", "image", [golden_image(name).read_bytes()])
    np.testing.assert_array_equal(answer["pixels"][0], PIXELS[name])


@pytest.mark.parametrize(
    ("ensemble", "outputs"),
    [
        ("probabilities", ["probabilities"]),
        ("embed", ["embedding"]),
        ("features", ["neck"]),
        ("everything", ["probabilities", "embedding", "neck"]),
    ],
)
def test_served_full_model_gives_birders_numbers(
    full_server: Server, ensemble: str, outputs: list[str]
) -> None:
    files = [golden_image(photo).read_bytes() for photo in PHOTOS]
    answer = full_server.infer(ensemble, "image", files, outputs=outputs)
    for output in outputs:
        np.testing.assert_allclose(
            answer[output], expected(output), atol=TOLERANCES[output], rtol=0
        )


def test_served_classes_are_birders_best(full_server: Server) -> None:
    answer = full_server.infer("classify", "image", [golden_image(p).read_bytes() for p in PHOTOS])
    probabilities = expected("probabilities")
    order = np.argsort(-probabilities, axis=1)[:, :100]
    np.testing.assert_allclose(
        answer["scores"], np.take_along_axis(probabilities, order, 1), atol=1e-6, rtol=0
    )
    # Indices by their score, because two near-equal classes may change places.
    chosen = np.take_along_axis(probabilities, answer["indices"].astype(int), 1)
    np.testing.assert_allclose(chosen, answer["scores"], atol=1e-6, rtol=0)
    assert (answer["indices"][:, :5] == order[:, :5]).all()
    labels = [[f"untrained class {i}".encode() for i in row] for row in answer["indices"]]
    assert answer["labels"].tolist() == labels


@pytest.mark.parametrize("file", TINY)
def test_served_tiny_model_gives_the_networks_numbers(file: str, tmp_path: Path) -> None:
    """The whole way (file form, trace, repository, gRPC) for each form of checkpoint."""
    checkpoint = vit_builder.load(GOLDENS / file)
    settings = vit_builder.Settings(precision="fp32", max_batch_size=8, top_k=5)
    vit_builder.build(checkpoint, settings, tmp_path / "models")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    with torch.inference_mode():
        served = ServedViT(checkpoint.network(), checkpoint, "fp32", 5)
        probabilities, embedding, neck, scores, indices = served(torch.from_numpy(pixels))
    with serving(tmp_path / "models") as server:
        files = [png(image) for image in pixels]
        for ensemble, output, wanted, tolerance in [
            ("probabilities", "probabilities", probabilities, 1e-6),
            ("embed", "embedding", embedding, 1e-6),
            ("features", "neck", neck, 1e-5),
            ("classify", "scores", scores, 1e-6),
            ("classify", "indices", indices, 0),
        ]:
            answer = server.infer(ensemble, "image", files)[output]
            np.testing.assert_allclose(answer, wanted, atol=tolerance, rtol=0)
        labels = [[checkpoint.labels[i].encode() for i in row] for row in indices]
        assert server.infer("classify", "image", files)["labels"].tolist() == labels


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_batch_size_gives_the_same_numbers(precision: str, device: str) -> None:
    """A trace can bake in the batch it was made with. Either device's file runs on the CPU."""
    checkpoint = vit_builder.load(GOLDENS / "tiny.pt")
    module = reloaded(trace(checkpoint, precision, 12, device))
    pixels = torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8)
    tolerance = {"fp32": 1e-5, "bf16": 0.1, "fp16": 1e-2}[precision]
    with torch.inference_mode():
        alone = [module(image[None]) for image in pixels]
        for size in range(1, 17):
            together = module(pixels[:size])
            assert [len(output) for output in together] == [size] * 5
            for i in range(4):
                wanted = torch.cat([outputs[i] for outputs in alone[:size]])
                torch.testing.assert_close(together[i], wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.1)])
def test_a_cpus_layers_give_the_plain_ones_numbers(precision: str, tolerance: float) -> None:
    checkpoint = vit_builder.load(GOLDENS / "tiny.pt")
    plain, fused = (reloaded(trace(checkpoint, precision, 12, d)) for d in ("cuda", "cpu"))
    # A GPU's LibTorch may have been built without oneDNN, and could not load its operators.
    assert "mkldnn" in code(fused)
    assert "mkldnn" not in code(plain)
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        for ours, wanted in zip(fused(pixels)[:4], plain(pixels)[:4], strict=True):
            torch.testing.assert_close(ours, wanted, atol=tolerance, rtol=0)


def code(module: torch.jit.ScriptModule) -> str:
    """All operators that it calls."""
    return str(module.inlined_graph)
