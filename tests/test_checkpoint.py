"""What is a checkpoint of this network, and what is told of a file that is none."""

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vit_builder
from conftest import GOLDENS, built
from safetensors.torch import save_file
from vit_builder.model import ViTConfig

Content = dict[str, Any]


@pytest.fixture
def content() -> Content:
    return dict(torch.load(GOLDENS / "tiny.pt", weights_only=True))


def test_the_three_forms_are_one_model() -> None:
    current, tensors, legacy = (
        vit_builder.load(GOLDENS / name)
        for name in ("tiny.pt", "tiny.safetensors", "tiny-legacy.pt")
    )
    assert current.config == tensors.config == legacy.config
    assert current.labels == tensors.labels == legacy.labels
    assert current.labels[1].startswith("n01573898 bobolink")
    assert current.rgb_mean == tensors.rgb_mean == legacy.rgb_mean == (0.5191, 0.5306, 0.4877)
    for name, tensor in current.state.items():
        torch.testing.assert_close(tensors.state[name], tensor, atol=0, rtol=0)
        torch.testing.assert_close(legacy.state[name], tensor, atol=0, rtol=0)


def test_sibling_checkpoint_needs_no_code_change(tmp_path: Path) -> None:
    """As `…-inat21`: another size, other classes, the network's own depth (no config)."""
    config = ViTConfig(image_size=(384, 384), num_classes=10_000, num_layers=2)
    vit_builder.save(vit_builder.random(config), tmp_path / "sibling.safetensors")
    loaded = vit_builder.load(tmp_path / "sibling.safetensors")
    assert loaded.config == config
    assert loaded.state["pos_embedding"].shape == (1, 4 + 24 * 24, 512)
    assert loaded.name == "sibling"
    assert loaded.trained


def test_a_checkpoint_without_config_has_the_published_sizes(tmp_path: Path) -> None:
    checkpoint = vit_builder.random(ViTConfig(num_classes=3))
    names = {"a": 0, "b": 1, "c": 2}
    content = {
        "state": checkpoint.state,
        "signature": {
            "inputs": [{"data_shape": [0, 3, 256, 256]}],
            "outputs": [{"data_shape": [0, 3]}],
        },
        "class_to_idx": names,
        "rgb_stats": {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
    }
    torch.save(content, tmp_path / "x.pt")
    assert vit_builder.load(tmp_path / "x.pt").config == ViTConfig(num_classes=3)


def test_labels_are_by_index_not_by_order(content: Content, tmp_path: Path) -> None:
    content["class_to_idx"] = dict(reversed(content["class_to_idx"].items()))
    torch.save(content, tmp_path / "x.pt")
    labels = vit_builder.load(tmp_path / "x.pt").labels
    assert labels == vit_builder.load(GOLDENS / "tiny.pt").labels


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "model._orig_mod.", "module.module."])
def test_names_of_a_wrapped_network(content: Content, tmp_path: Path, before: str) -> None:
    """As torch.compile and DataParallel save them."""
    content["state"] = {f"{before}{name}": tensor for name, tensor in content["state"].items()}
    torch.save(content, tmp_path / "x.pt")
    state, expected = (vit_builder.load(p).state for p in (tmp_path / "x.pt", GOLDENS / "tiny.pt"))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_names_of_a_network_with_a_compiled_part(content: Content, tmp_path: Path) -> None:
    content["state"] = {
        name.replace("encoder.block.0.", "encoder.block.0._orig_mod."): tensor
        for name, tensor in content["state"].items()
    }
    torch.save(content, tmp_path / "x.pt")
    expected = vit_builder.load(GOLDENS / "tiny.pt").state.keys()
    assert vit_builder.load(tmp_path / "x.pt").state.keys() == expected


def change(key: str, value: object) -> Callable[[Content], None]:
    return lambda content: content.update({key: value})


def change_state(name: object, value: object) -> Callable[[Content], None]:
    return lambda content: content["state"].update({name: value})


BROKEN = {
    "no state": (lambda c: c.pop("state"), "has no `state`"),
    "no labels": (lambda c: c.pop("class_to_idx"), "has no `class_to_idx`"),
    "no statistics": (change("rgb_stats", {"mean": (0, 0, 0)}), "malformed .KeyError.'std'"),
    "zero deviation": (change("rgb_stats", {"mean": (0,) * 3, "std": (0,) * 3}), "not three means"),
    "no inputs": (change("signature", {"inputs": []}), "malformed"),
    "missing": (lambda c: c["state"].pop("norm.weight"), "its state lacks norm.weight$"),
    "missing many": (
        lambda c: [c["state"].pop(n) for n in list(c["state"]) if "mlp.0" in n],
        r"lacks encoder.block.0.mlp.0.weight and 5 more$",
    ),
    "extra": (change_state("layer4.0.conv1.weight", torch.zeros(1)), "has layer4.0.conv1.weight"),
    "shape": (
        change_state("pos_embedding", torch.zeros(1, 5, 64)),
        r"pos_embedding has the shape \[1, 5, 64\], not \[1, 20, 64\]",
    ),
    "integers": (change_state("norm.weight", torch.zeros(64).int()), "floating-point"),
    "not finite": (change_state("norm.weight", torch.full((64,), torch.nan)), "not finite"),
    "config": (change("config", {"attn_pool_head": True}), r"its config has \['attn_pool_head'\]"),
    "config value": (change("config", {"num_layers": "three"}), "positive whole number"),
    "config is a word": (change("config", "abc"), "its config is 'abc', not a table"),
    "config without end": (
        change("config", {"mlp_dim": 10**18}),
        "of sensible size for .'mlp_dim'",
    ),
    "number for a name": (change_state(7, torch.zeros(1)), "has 7 as the name"),
    "both layouts": (
        change_state("encoder.block.0.ln1.weight", torch.zeros(64)),
        "encoder.block.0.norm1.weight twice",
    ),
    "another task": (change("task", "object_detection"), "it is for object_detection"),
    "heads": (
        lambda c: c["config"].update(num_heads=7),
        "64 dimensions are not divisible by 7 heads",
    ),
    "size": (
        change(
            "signature",
            {"inputs": [{"data_shape": [0, 3, 65, 64]}], "outputs": [{"data_shape": [0, 12]}]},
        ),
        "65x64 is not a multiple of 16",
    ),
    "wrapped and not": (
        change_state("module.norm.weight", torch.zeros(64)),
        "norm.weight twice, under different names",
    ),
    "no classes": (
        lambda c: c["signature"].update(outputs=[{"data_shape": [0, 0]}]),
        "has no classifier .0 classes",
    ),
    "labels": (change("class_to_idx", {"one": 1}), "does not number its 12 classes"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_what_is_wrong_is_said_in_one_sentence(kind: str, content: Content, tmp_path: Path) -> None:
    spoil, reason = BROKEN[kind]
    spoil(content)
    torch.save(content, tmp_path / "broken.pt")
    with pytest.raises(vit_builder.CheckpointError, match=reason) as raised:
        vit_builder.load(tmp_path / "broken.pt")
    assert str(tmp_path / "broken.pt") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["tiny.pt", "tiny.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file(name: str, share: float, tmp_path: Path) -> None:
    data = (GOLDENS / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        vit_builder.CheckpointError,
        match=r"truncated or damaged, or is not a checkpoint$|neither a torch|damaged: ",
    ):
        vit_builder.load(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(vit_builder.CheckpointError, match="no such file"):
        vit_builder.load(tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(vit_builder.CheckpointError, match="contains a list"):
        vit_builder.load(tmp_path / "list.pt")
    save_file({"weight": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(vit_builder.CheckpointError, match="has no `signature`"):
        vit_builder.load(tmp_path / "bare.safetensors")
    (tmp_path / "photo.pt").write_bytes((GOLDENS / "images" / "gray.jpg").read_bytes())
    with pytest.raises(vit_builder.CheckpointError, match="neither a torch file"):
        vit_builder.load(tmp_path / "photo.pt")
    with pytest.raises(vit_builder.CheckpointError, match="is a directory"):
        vit_builder.load(tmp_path)


def test_the_form_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "A.SAFETENSORS").write_bytes((GOLDENS / "tiny.pt").read_bytes())
    (tmp_path / "b.pt").write_bytes((GOLDENS / "tiny.safetensors").read_bytes())
    a, b = vit_builder.load(tmp_path / "A.SAFETENSORS"), vit_builder.load(tmp_path / "b.pt")
    assert a.labels == b.labels


def test_a_safetensors_header_of_any_length_is_recognised(tmp_path: Path) -> None:
    """Its first byte can be that of a pickle, 0x80: label lengths go through all of them."""
    checkpoint = vit_builder.load(GOLDENS / "tiny.pt")
    firsts = set()
    for length in range(0, 256, 8):
        labels = ["x" * length, *checkpoint.labels[1:]]
        path = tmp_path / "x.safetensors"
        vit_builder.save(dataclasses.replace(checkpoint, labels=labels), path)
        firsts.add(path.read_bytes()[0])
        assert vit_builder.load(path).labels == labels
    assert 0x80 in firsts


def test_a_torchscript_archive_is_told_shortly(tiny_repository: Path) -> None:
    with pytest.raises(
        vit_builder.CheckpointError,
        match=r"model\.pt is truncated or damaged, or is not a checkpoint$",
    ):
        vit_builder.load(built(tiny_repository, "vit", "model.pt"))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda c, p: p.write_bytes(pickle.dumps(c))])
def test_no_pickle_is_executed(
    save: Callable[[Content, Path], None], content: Content, tmp_path: Path
) -> None:
    content["class_to_idx"] = Malicious(tmp_path / "owned")
    save(content, tmp_path / "evil.pt")
    with pytest.raises(vit_builder.CheckpointError, match="not opened: "):
        vit_builder.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": ["a", "b"]}, "2 labels for 12 classes"),
        ({"labels": ["a"] * 12}, "more than one class has the label 'a'"),
        ({"rgb_std": (0.0, 1.0, 1.0)}, "three standard deviations"),
        ({"state": {}}, "its state lacks"),
    ],
)
def test_what_does_not_fit_together_is_not_saved(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    tiny = vit_builder.load(GOLDENS / "tiny.pt")
    with pytest.raises(vit_builder.CheckpointError, match=reason):
        vit_builder.save(dataclasses.replace(tiny, **change), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_save_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        vit_builder.CheckpointError, match=r"nowhere/x\.safetensors cannot be written"
    ):
        vit_builder.save(vit_builder.load(GOLDENS / "tiny.pt"), tmp_path / "nowhere/x.safetensors")
