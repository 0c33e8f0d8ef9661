"""The images as the Dockerfile makes them."""

from .engine import Engine


def test_they_are_built(docker: Engine, images: dict[str, float]) -> None:
    for image in images:
        print(image, images[image])
