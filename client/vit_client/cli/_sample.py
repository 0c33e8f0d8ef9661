"""A sample of a shard, and what can be wrong with it or with the shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """One image of a shard, or why there is none."""

    key: str
    image: bytes | Unusable
    kept: dict[str, Any] = field(default_factory=dict)
    """The chosen fields or columns, by name."""


class Unusable:
    """Stands for an image that cannot be had: the client reports its reason."""

    def __init__(self, why: str) -> None:
        self._why = why

    def read(self, _: int = -1) -> bytes:
        """Always fails."""
        raise OSError(self._why)


class CutShort(Exception):
    """The shard is damaged from here on; what was whole has been yielded.

    Attributes:
        told: whether a sample with the reason has been yielded, too.
    """

    def __init__(self, why: str, *, told: bool = False) -> None:
        super().__init__(why)
        self.told = told
