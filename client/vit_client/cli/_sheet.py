"""`--sheet`: images and what was answered about them, as one picture."""

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
"""In one sheet, at most; a picture of more has too many pixels for some formats and viewers."""

TILE, GAP = 192, 16
"""Pixels of a thumbnail's square, and around it."""

_COLUMNS = 10
_LINE, _PADDING = 17, 10
_BACKGROUND, _TEXT, _FAINT, _PROBLEM, _MARK = "#f1f1f1", "#111111", "#666666", "#a02020", "#0b57d0"

# Pillow's own font has no letter beyond ASCII. Linux has the first, Windows and macOS the others.
_FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf")

Caption = tuple[str, str]
"""A line under a thumbnail: what stands to the left, and what to the right."""


class Sheet:
    """A grid of thumbnails on white, with captions; drawn as the answers come."""

    def __init__(self, path: Path, names: Sequence[str], lines: int) -> None:
        """
        Args:
            path: The file to write.
            names: Of all images that will be added; those beyond `CELLS` are left out, which is
                told.
            lines: The captions of an image, at most.
        """
        self._path = path
        self._left = min(len(names), CELLS)
        if len(names) > CELLS:
            note(f"the first {CELLS} of {len(names)} images are in the sheet")
        self._folder = _common_folder(names[:CELLS])
        # As wide as a screen, and the last row about as full as the others.
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
            image: A path, or what was read.
            captions: The answer.
            problem: Why there is none; the image is not looked at then.
            marked: Whether the cell is to stand out.
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
            except UnidentifiedImageError:  # its words are of an object in memory
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
        """Write the file, whole or not at all."""
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
        """Write `text` in a tile, on as many lines as it takes or has room for."""
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
        """`text` on one line, in letters that do not make the font raise an error."""
        text = shortened(text)
        if isinstance(self._font, ImageFont.ImageFont):
            return text.replace("…", "...").encode("latin-1", "replace").decode("latin-1")
        return text


def thumbnail(image: str | Source) -> Image.Image:
    """The whole image as large as fits into a tile, in the pixels that the model sees.

    Raises:
        Exception: Nearly any, from Pillow.
    """
    if isinstance(image, Source):
        photo = decoded(io.BytesIO(image.data), TILE)
    elif image == STDIN:  # in a file of embeddings
        raise FileNotFoundError("it came from standard input")
    elif not os.path.isfile(image):  # noqa: PTH113  # Path's own way raises for some names
        raise FileNotFoundError("no such file")
    else:
        photo = decoded(image, TILE)
    scale = TILE / max(photo.size)
    if scale >= 2:  # pixels as squares, all of one size
        scale, way = int(scale), Image.Resampling.NEAREST
    else:
        way = Image.Resampling.BICUBIC
    width, height = (max(1, round(side * scale)) for side in photo.size)
    return photo.resize((width, height), way)


def _common_folder(names: Sequence[str]) -> str:
    """The folder that all are below; "" if there is none to leave out."""
    try:
        return os.path.commonpath([os.path.dirname(name) for name in names if name != STDIN])  # noqa: PTH120
    except ValueError:  # no name at all, or some from / and some from here
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
    """More of the end, which has the number of a photo and the suffix."""
    start = kept // 3
    return f"{text[:start]}...{text[len(text) - kept + start :]}"
