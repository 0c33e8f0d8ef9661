"""`--sheet`: images and their results as one picture."""

from __future__ import annotations

import contextlib
import io
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from ..errors import shortened
from ._common import reason
from ._inputs import STDIN, Source
from ._pictures import decoded, write_picture
from ._report import note

CELLS = 300
"""Maximum per sheet; with more, it has too many pixels for some formats and viewers."""

TILE, GAP = 192, 16
"""Side of a thumbnail's square and the gap around it, in pixels."""

_COLUMNS = 10
_LINE, _PADDING = 17, 10
_BACKGROUND, _TEXT, _FAINT, _PROBLEM, _MARK = "#f1f1f1", "#111111", "#666666", "#a02020", "#0b57d0"

# Pillow's built-in font is ASCII only. The first is on Linux, the others on Windows and macOS.
_FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf")

Caption = tuple[str, str]
"""A line under a thumbnail: its left and its right text."""


class Sheet:
    """A grid of thumbnails on white, with captions; drawn as results arrive."""

    def __init__(self, path: Path, names: Sequence[str], lines: int) -> None:
        """
        Args:
            path: The file to write.
            names: Names of all images that will be added; those beyond `CELLS` are left out, with
                a note.
            lines: Maximum captions per image.
        """
        self._path = path
        self._left = min(len(names), CELLS)
        if len(names) > CELLS:
            note(f"the first {CELLS} of {len(names)} images are in the sheet")
        self._folder = _common_folder(names[:CELLS])
        # Roughly the shape of a screen, with the last row about as full as the others.
        columns = min(_COLUMNS, max(5, math.ceil(math.sqrt(2.4 * self._left))))
        rows = math.ceil(self._left / columns)
        columns = math.ceil(self._left / rows)
        height = TILE + GAP // 4 + (lines + 1) * _LINE + GAP
        self._corners = (
            (GAP + column * (TILE + GAP), GAP + row * height)
            for row in range(rows)
            for column in range(columns)
        )
        size = (GAP + columns * (TILE + GAP), GAP + rows * height)
        self._picture = Image.new("RGB", size, "white")
        self._draw = ImageDraw.Draw(self._picture)
        self._font = _font()

    def add(
        self,
        image: str | Source,
        captions: Sequence[Caption] = (),
        *,
        problem: str = "",
        marked: bool = False,
    ) -> None:
        """Draw the next cell.

        Args:
            image: A path, or a Source that was read.
            captions: The result.
            problem: Why there is no result; the image is then not read.
            marked: Whether to highlight the cell.
        """
        if not self._left:
            return
        self._left -= 1
        x, y = next(self._corners)
        if marked:
            frame = (x - 5, y - 5, x + TILE + 4, y + TILE + 4)
            self._draw.rectangle(frame, outline=_MARK, width=4)
        self._draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=_BACKGROUND)
        if not problem:
            try:
                small = thumbnail(image)
                middle = (x + (TILE - small.width) // 2, y + (TILE - small.height) // 2)
                self._picture.paste(small, middle)
            except UnidentifiedImageError:  # its message names an object in memory
                problem = "no picture: Pillow cannot read it here"
            except OSError as failure:
                problem = f"no picture: {reason(failure)}"
            except Exception as failure:  # Pillow raises nearly anything
                problem = f"no picture: {failure or type(failure).__name__}"
        if problem:
            self._tell(problem, x + _PADDING, y + _PADDING)
        y += TILE + GAP // 4
        for left, right in captions:
            self._caption(left, right, (x, y), _MARK if marked else _TEXT)
            y += _LINE
        title = self._cut(self._title(image), TILE, _middle_cut)
        self._draw.text((x, y), title, _FAINT, self._font)

    def save(self) -> None:
        """Write the file atomically."""
        write_picture(self._picture, self._path)

    def _title(self, image: str | Source) -> str:
        name = image.name if isinstance(image, Source) else image
        if name == STDIN:
            return "standard input"
        return os.path.relpath(name, self._folder) if self._folder else name

    def _caption(self, left: str, right: str, corner: tuple[int, int], colour: str) -> None:
        x, y = corner
        width = math.ceil(self._font.getlength(right))
        self._draw.text((x + TILE - width, y), right, colour, self._font)
        room = TILE - width - _PADDING if right else TILE
        self._draw.text((x, y), self._cut(left, room, _end_cut), colour, self._font)

    def _tell(self, text: str, x: int, y: int) -> None:
        """Draw `text` in a tile, wrapped to as many lines as fit."""
        width, most = TILE - 2 * _PADDING, (TILE - 2 * _PADDING) // _LINE
        lines = [""]
        for word in self._known(text).split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self._font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        if len(lines) > most:
            lines[most - 1 :] = [" ".join(lines[most - 1 :])]
        for number, line in enumerate(lines):
            line = self._cut(line, width, _end_cut)
            self._draw.text((x, y + number * _LINE), line, _PROBLEM, self._font)

    def _cut(self, text: str, width: int, cut: Callable[[str, int], str]) -> str:
        """As much of `text` as fits into `width` pixels on one line."""
        text = self._known(text)
        if self._font.getlength(text) <= width:
            return text
        too_wide = lambda kept: self._font.getlength(cut(text, kept)) > width  # noqa: E731
        return cut(text, max(0, bisect_left(range(len(text)), True, key=too_wide) - 1))

    def _known(self, text: str) -> str:
        """`text` on one line, without characters for which the font raises an error."""
        text = shortened(text)
        if isinstance(self._font, ImageFont.ImageFont):
            return text.replace("…", "...").encode("latin-1", "replace").decode("latin-1")
        return text


def thumbnail(image: str | Source) -> Image.Image:
    """The image scaled to fit a tile, with the pixels that the model sees.

    Raises:
        Exception: Pillow raises nearly any.
    """
    if isinstance(image, Source):
        photo = decoded(io.BytesIO(image.data), TILE)
    elif image == STDIN:  # named in a file of embeddings
        raise FileNotFoundError("it came from standard input")
    elif not os.path.isfile(image):  # noqa: PTH113  # Path's method raises for some names
        raise FileNotFoundError("no such file")
    else:
        photo = decoded(image, TILE)
    scale = TILE / max(photo.size)
    if scale >= 2:  # show pixels as squares of equal size
        scale, way = int(scale), Image.Resampling.NEAREST
    else:
        way = Image.Resampling.BICUBIC
    width, height = (max(1, round(side * scale)) for side in photo.size)
    return photo.resize((width, height), way)


def _common_folder(names: Sequence[str]) -> str:
    """The folder that contains all files; "" if there is none."""
    try:
        return os.path.commonpath([os.path.dirname(name) for name in names if name != STDIN])  # noqa: PTH120
    except ValueError:  # no names, or absolute and relative ones
        return ""


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    size = 12
    with contextlib.suppress(ImportError):  # a Pillow without FreeType
        for name in _FONTS:
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
        return ImageFont.load_default(size)
    return ImageFont.load_default()


def _end_cut(text: str, kept: int) -> str:
    return f"{text[:kept].rstrip()}..."


def _middle_cut(text: str, kept: int) -> str:
    """Shorten in the middle, keeping more of the end: the number of a photo, and the suffix."""
    start = kept // 3
    return f"{text[:start]}...{text[len(text) - kept + start :]}"
