"""Progress of a stream: a bar, a callback, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from .errors import ConfigurationError

Progress = bool | Callable[[int], object]


class Meter:
    """Counts processed images and reports them."""

    def __init__(self, progress: Progress, images: Any) -> None:
        self._done = 0
        self._tell = progress if callable(progress) else None
        self._bar: Any = None
        if progress is True:
            self._bar = _bar(len(images) if hasattr(images, "__len__") else None)

    def add(self, count: int) -> None:
        """`count` more images are done."""
        self._done += count
        if self._tell is not None:
            self._tell(self._done)
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(total: int | None) -> Any:
    try:
        # Imported by name, because type checkers would report a missing extra.
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        raise ConfigurationError(
            'progress=True needs tqdm: pip install "vit-client[progress]"'
        ) from None
    return tqdm(total=total, unit="image", smoothing=0.05, dynamic_ncols=True)
