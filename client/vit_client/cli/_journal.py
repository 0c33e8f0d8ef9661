"""The journal from which an interrupted run resumes: an SQLite file next to the output."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import ConfigurationError, shortened
from ..types import Analysis, Prediction
from ._common import CannotWrite
from ._tables import Block

# Seconds between commits: how much work a crash may lose.
_COMMIT_SECONDS = 1.0


def left_model(output: Path) -> str:
    """The model in the journal that an interrupted run left next to `output`; "" if none."""
    try:
        uri = f"{_path(output).absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, timeout=0, uri=True)) as db:
            (left,) = db.execute("SELECT model FROM model").fetchone() or ("",)
    except sqlite3.Error:  # no journal; a damaged or locked one is reported on opening
        return ""
    return _of_model(left)


def _path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _of_model(asked: str) -> str:
    return asked.rsplit(", top_k ", 1)[0]


class Journal:
    """Results so far, by image.

    An image counts as done as long as its file is unchanged (size and modification time).
    """

    def __init__(self, output: Path, model: str, top_k: int) -> None:
        """Open the journal of `output`, or create one. Results with another number of classes are
        dropped.

        Raises:
            ConfigurationError: It is of another model, in use by another run, or damaged.
            CannotWrite: No permission, or the disk is full; also raised by the other methods.
        """
        self.path = _path(output)
        self._last_commit = time.monotonic()
        # Differs from what versions without classes wrote: their rows have other columns.
        asked = f"{model}, top_k {top_k}"
        with self._errors_told():
            self._db = sqlite3.connect(self.path, timeout=0)
            # Locks the file until it is closed, so that two runs cannot mix.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("CREATE TABLE IF NOT EXISTS model (model TEXT)")
            for (left,) in self._db.execute("SELECT model FROM model").fetchall():
                self._refuse_another(_of_model(left), model)
            if self._db.execute("SELECT model FROM model").fetchall() != [(asked,)]:
                self._db.execute("DELETE FROM model")
                self._db.execute("DROP TABLE IF EXISTS rows")
                self._db.execute(
                    "CREATE TABLE rows (image BLOB PRIMARY KEY, stamp TEXT, embedding BLOB, "
                    "predictions TEXT) WITHOUT ROWID"
                )
                self._db.execute("INSERT INTO model VALUES (?)", (asked,))
            self._db.commit()

    def _refuse_another(self, left: str, model: str) -> None:
        """Raise ConfigurationError if the results are of the model `left`, not of `model`."""
        if left == model:
            return
        (images,) = self._db.execute("SELECT COUNT(*) FROM rows").fetchone()
        if images:
            self._db.close()
            path = shortened(self.path)
            raise ConfigurationError(
                f"{path} has {images} images by another model than this server's: delete it to "
                "start over, or give the --url of a server with that model "
                f"({shortened(left)}; this one: {shortened(model)})"
            )

    def done(self, names: Sequence[str]) -> set[str]:
        """Those of `names` that need not be processed again."""
        with self._errors_told():
            stamps = dict(self._db.execute("SELECT image, stamp FROM rows"))
        return {name for name in names if stamps.get(os.fsencode(name)) == _stamp(name)}

    def add(self, name: str, answer: Analysis) -> None:
        """Store one result; it has no predictions if none are requested."""
        guesses = [(guess.label, guess.index, guess.score) for guess in answer.predictions]
        vector = answer.embedding.tobytes()
        row = (os.fsencode(name), _stamp(name), vector, json.dumps(guesses))
        with self._errors_told():
            self._db.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", row)
            now = time.monotonic()
            if now - self._last_commit > _COMMIT_SECONDS:
                self._db.commit()
                self._last_commit = now

    def blocks(self, names: Sequence[str], size: int) -> Iterator[Block]:
        """The results for `names`, `size` rows at a time."""
        select = "SELECT embedding, predictions FROM rows WHERE image = ?"
        for start in range(0, len(names), size):
            keys = [(os.fsencode(name),) for name in names[start : start + size]]
            with self._errors_told():
                rows = [self._db.execute(select, key).fetchone() for key in keys]
            data = b"".join(vector for vector, _ in rows)
            yield Block(
                np.frombuffer(data, np.float32).reshape(len(rows), -1),
                [[Prediction(*guess) for guess in json.loads(guesses)] for _, guesses in rows],
            )

    def close(self) -> None:
        """Commit for the next run, as far as the disk has room."""
        with contextlib.suppress(sqlite3.Error):
            self._db.commit()
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    def delete(self) -> None:
        """Delete the journal, once the output is written."""
        self._db.close()
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors_told(self) -> Iterator[None]:
        path = shortened(self.path)
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                text = f"{path}: is another run writing it? ({error})"
                raise ConfigurationError(text) from None
            raise CannotWrite(f"{path} cannot be written ({error})") from None
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"{path} is damaged, delete it ({error})") from None


def _stamp(name: str) -> str:
    try:
        status = Path(name).stat()
    except OSError:
        return ""  # standard input, or deleted meanwhile
    return f"{status.st_size} {status.st_mtime_ns}"
