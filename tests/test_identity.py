"""The model's version: another number for whatever gives other answers, and only for that."""

from dataclasses import replace
from pathlib import Path

import pytest
import vit_builder
from conftest import GOLDENS, built
from vit_builder.identity import version

SETTINGS = vit_builder.Settings(precision="fp32", max_batch_size=16, top_k=12)
TINY = 135804058132626


@pytest.fixture(scope="module")
def tiny() -> vit_builder.Checkpoint:
    return vit_builder.load(GOLDENS / "tiny.pt")


@pytest.mark.parametrize("file", ["tiny.pt", "tiny-legacy.pt", "tiny.safetensors"])
def test_the_same_weights_have_the_same_version(file: str) -> None:
    """In every layout and kind of file, on every machine."""
    assert version(vit_builder.load(GOLDENS / file), SETTINGS) == TINY


@pytest.mark.parametrize(
    "same",
    [
        {"max_batch_size": 4},
        {"device": "cuda"},
        {"max_image_pixels": 1_000_000},
        {"max_request_bytes": 1 << 20},
    ],
    ids=str,
)
def test_what_changes_no_answer(tiny: vit_builder.Checkpoint, same: dict[str, object]) -> None:
    assert version(replace(tiny, name="copy"), replace(SETTINGS, **same)) == TINY  # type: ignore[arg-type]


def test_what_changes_answers(tiny: vit_builder.Checkpoint) -> None:
    weight = tiny.state["classifier.weight"].clone()
    weight[3, 5] += 1e-6
    changed = [
        version(tiny, replace(SETTINGS, precision="bf16")),
        version(tiny, replace(SETTINGS, neck_precision="fp16")),
        version(tiny, replace(SETTINGS, top_k=5)),
        version(tiny, replace(SETTINGS, fast_jpeg=True)),
        version(replace(tiny, state={**tiny.state, "classifier.weight": weight}), SETTINGS),
        version(replace(tiny, labels=tiny.labels[::-1]), SETTINGS),
        version(replace(tiny, rgb_mean=tiny.rgb_std), SETTINGS),
    ]
    assert len({TINY, *changed}) == len(changed) + 1
    assert all(1 < number < 2**48 for number in changed)


def test_all_models_of_a_repository_have_it(tiny_repository: Path) -> None:
    models = [path.parent.name for path in tiny_repository.glob("*/config.pbtxt")]
    assert len(models) == 9
    assert {built(tiny_repository, model).name for model in models} == {str(TINY)}
