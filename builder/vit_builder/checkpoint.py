"""Reads birder checkpoints: `.pt` (weights only, no pickle code runs) and `.safetensors`."""

import json
import pickle
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .model import ViT, ViTConfig

# birder renamed parameters between its releases; the values are the same.
_LEGACY_NAMES = (
    (r"\.ln(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
)
# Prefixes of names by torch.compile, DataParallel and Lightning (or infixes, for a submodule).
_WRAPPERS = re.compile(r"^(?:(?:module|model|_forward_module|_orig_mod)\.)+|\b_orig_mod\.")
_CONFIG_FIELDS = {f.name for f in fields(ViTConfig)} - {"image_size", "num_classes", "norm_eps"}
_TRAINING_ONLY = {"drop_path_rate"}  # config overrides that change nothing at inference
# Mean and standard deviation of the published checkpoint, for models with random weights.
_RGB_MEAN, _RGB_STD = (0.5191, 0.5306, 0.4877), (0.2316, 0.2304, 0.2588)


class CheckpointError(Exception):
    """The file is not a checkpoint of this network; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's sizes, weights, labels and colour statistics."""

    name: str
    config: ViTConfig
    state: dict[str, Tensor]  # float32, birder's current names
    labels: list[str]  # by class index
    rgb_mean: tuple[float, float, float]
    rgb_std: tuple[float, float, float]
    trained: bool

    def network(self) -> ViT:
        """Return the network with these weights, in fp32 and eval mode."""
        network = ViT(self.config)
        network.load_state_dict(self.state)
        return network.eval()


def load(path: Path) -> Checkpoint:
    """Load a birder checkpoint, in the current or the legacy layout.

    Image size, classes, labels and rgb_stats are taken from the file, and overrides of the
    network's sizes if it has a `config`.

    Raises:
        CheckpointError: it is not such a checkpoint; says why in one sentence.
    """
    try:
        with path.open("rb") as f:
            start = f.read(9)
    except OSError as e:
        raise CheckpointError(f"{path}: {(e.strerror or str(e)).lower()}") from e
    # A safetensors file starts with the length of its header (8 bytes, of any value) and the
    # header, which is JSON. A torch file is a zip archive, and was a bare pickle before 2020.
    if start[8:] == b"{":
        content = _read_safetensors(path)
    elif start.startswith((b"PK\x03\x04", b"\x80")):
        content = _read_pt(path)
    else:
        raise CheckpointError(f"{path} is neither a torch file (.pt) nor a safetensors file")
    try:
        return _interpret(path.stem, content)
    except CheckpointError as e:
        raise CheckpointError(f"{path} is not a checkpoint of this network: {e}") from None


def random(config: ViTConfig | None = None) -> Checkpoint:
    """Return a model with random weights, identical on every machine.

    Each tensor is seeded by the CRC-32 of its name and scaled so that activations stay in range.
    """
    config = config or ViTConfig()
    state: dict[str, Tensor] = {}
    for name, parameter in _skeleton(config).items():
        seed = zlib.crc32(name.encode()) % 2**32
        normal = np.random.RandomState(seed).standard_normal(parameter.numel())
        r = torch.from_numpy(normal.astype(np.float32)).reshape(parameter.shape)
        if "norm" in name:
            r = 1 + 0.1 * r
        elif name == "classifier.weight":
            r = r * (4 / config.hidden_dim**0.5)
        elif name in ("pos_embedding", "reg_tokens"):
            r = 0.5 * r
        elif r.ndim >= 2:
            r = r / r[0].numel() ** 0.5
        else:
            r = 0.1 * r
        state[name] = r
    labels = [f"untrained class {i}" for i in range(config.num_classes)]
    return Checkpoint("random", config, state, labels, _RGB_MEAN, _RGB_STD, trained=False)


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint in birder's `.safetensors` format (`load` reads it back).

    Raises:
        CheckpointError: its parts do not fit together, or it cannot be written.
    """
    labels, classes = checkpoint.labels, checkpoint.config.num_classes
    if len(labels) != classes:
        raise CheckpointError(f"{len(labels)} labels for {classes} classes")
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise CheckpointError(f"more than one class has the label {twice[0]!r}")
    cfg = asdict(checkpoint.config)
    metadata = {
        "signature": {
            "inputs": [{"data_shape": [0, 3, *cfg["image_size"]]}],
            "outputs": [{"data_shape": [0, cfg["num_classes"]]}],
        },
        "class_to_idx": {label: i for i, label in enumerate(checkpoint.labels)},
        "rgb_stats": {"mean": checkpoint.rgb_mean, "std": checkpoint.rgb_std},
        "config": {name: cfg[name] for name in sorted(_CONFIG_FIELDS)},
        "task": "image_classification",
    }
    _interpret(checkpoint.name, {**metadata, "state": checkpoint.state})
    text = {key: json.dumps(value) for key, value in metadata.items()}
    try:
        save_file(checkpoint.state, path, text)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} cannot be written: {e}") from e


def _read_pt(path: Path) -> Mapping[str, Any]:
    # torch's own messages are not passed on: they suggest loading the file in a way that runs code.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{path} was not opened: it contains more than weights, and loading it could run code"
        ) from e
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as e:
        raise CheckpointError(f"{path} is truncated or damaged, or is not a checkpoint") from e
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} contains a {type(content).__name__}, not a birder checkpoint"
        )
    return content


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as f:
            content = {
                key: json.loads(v) for key, v in (f.metadata() or {}).items() if v[:1] in '{["'
            }
            content["state"] = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is truncated or damaged: {e}") from e
    except json.JSONDecodeError as e:
        raise CheckpointError(f"{path} has metadata that is not JSON: {e}") from e
    return content


def _interpret(name: str, content: Mapping[str, Any]) -> Checkpoint:
    for key in ("state", "signature", "class_to_idx", "rgb_stats"):
        if not isinstance(content.get(key), Mapping):
            hint = " (the weights alone are not enough: sizes and labels are needed too)"
            raise CheckpointError(f"it has no `{key}`{hint if key == 'state' else ''}")
    if content.get("task", "image_classification") != "image_classification":
        raise CheckpointError(f"it is for {content['task']}, not for image_classification")
    try:
        *_, height, width = content["signature"]["inputs"][0]["data_shape"]
        num_classes = int(content["signature"]["outputs"][0]["data_shape"][-1])
        config = ViTConfig(image_size=(int(height), int(width)), num_classes=num_classes)
        mean, std = (tuple(map(float, content["rgb_stats"][k])) for k in ("mean", "std"))
        by_index = {int(i): str(label) for label, i in content["class_to_idx"].items()}
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"its signature, rgb_stats or class_to_idx is malformed ({e!r})"
        ) from e
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise CheckpointError(
            f"its rgb_stats are not three means and three standard deviations: {mean}, {std}"
        )
    if not num_classes:
        raise CheckpointError(
            "it has no classifier (0 classes, as self-supervised training leaves it), and "
            "`classify` needs one: fine-tune it first"
        )
    if sorted(by_index) != list(range(num_classes)):
        raise CheckpointError(f"class_to_idx does not number its {num_classes} classes from 0")
    config = _override(config, content.get("config") or {})
    state = _check_state(content["state"], config)
    labels = [by_index[i] for i in range(num_classes)]
    return Checkpoint(name, config, state, labels, mean, std, trained=True)


def _override(config: ViTConfig, overrides: Mapping[str, Any]) -> ViTConfig:
    if not isinstance(overrides, Mapping):
        raise CheckpointError(f"its config is {overrides!r}, not a table of sizes")
    known = {key: value for key, value in overrides.items() if key not in _TRAINING_ONLY}
    if unknown := sorted(known.keys() - _CONFIG_FIELDS):
        raise CheckpointError(f"its config has {unknown}, which this network does not have")
    if wrong := [k for k, v in known.items() if type(v) is not int or not 0 < v < 2**20]:
        raise CheckpointError(
            f"its config has no positive whole number of sensible size for {wrong}"
        )
    config = replace(config, **known)
    height, width = config.image_size
    if height < 1 or width < 1 or height % config.patch_size or width % config.patch_size:
        raise CheckpointError(
            f"its image size {height}x{width} is not a multiple of {config.patch_size}"
        )
    if config.hidden_dim % config.num_heads:
        raise CheckpointError(
            f"{config.hidden_dim} dimensions are not divisible by {config.num_heads} heads"
        )
    return config


def _check_state(state: Mapping[str, Any], config: ViTConfig) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"its state has {name!r} as the name of a parameter")
        name = _WRAPPERS.sub("", name)
        for old, new in _LEGACY_NAMES:
            name = re.sub(old, new, name)
        if name in found:
            raise CheckpointError(f"its state has {name} twice, under different names")
        found[name] = tensor
    expected = _skeleton(config)
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"its state lacks {_some(missing)}")
    if extra := [name for name in found if name not in expected]:
        raise CheckpointError(f"its state has {_some(extra)}, which this network does not have")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{name} is not a tensor of floating-point numbers")
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[name].shape)}"
            raise CheckpointError(f"{name} has the shape {shapes}")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} contains numbers that are not finite")
    return {name: found[name].float().contiguous() for name in expected}


def _skeleton(config: ViTConfig) -> dict[str, Tensor]:
    """Return the parameters as meta tensors: names and shapes without memory."""
    with torch.device("meta"):
        return dict(ViT(config).state_dict())


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
