"""Arguments and help."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NoReturn

from .. import __version__
from ..errors import shortened
from ._answers import answer
from ._embed import embed_to_file
from ._features import features_to_file
from ._health import health
from ._parts import embed_to_folder
from ._shards import is_shard
from ._similar import similar

_DESCRIPTION = """\
Classify images, and compute their embeddings and feature maps, on a Triton server.

examples:
  vit-client classify cat.jpg                    the five best classes
  vit-client classify photos/ --json             all images below a folder, as JSON lines
  vit-client embed photos/ -o photos.npz         an embedding for each image, into a file
  vit-client analyze photos/ --json              classes and embedding, from one forward pass
  vit-client similar cat.jpg --to photos.npz     the images most similar to this one
  vit-client features cat.jpg --picture out.png  feature map, similar patches in similar colours
  vit-client health                              check the server, and show what it serves
"""

_IMAGES = """\
An IMAGE is a file, a folder, a quoted pattern such as 'img/**/*.jpg', or - for one image on
standard input. Everything after -- is an IMAGE, even -o.jpg (or write ./-o.jpg).

A folder stands for all image files below it (.jpg, .png, …), symbolic links included, hidden files
and system folders such as @eaDir and #recycle excluded. One line reports what was skipped.

For more names than fit on a command line (xargs would split them into several runs):
  find photos -name '*.jpg' -print0 | vit-client embed --files-from - -0 -o photos.npz
Each of these names must be a file, not a folder or a pattern.
"""

_SHARDS = """\
Of a dataset in shards (WebDataset's .tar, Parquet, Arrow), into a folder of Parquet files, one for
every 10,000 images of a shard, with columns shard, key, embedding, model_version, error, and the
kept ones:
  vit-client embed 'shards/{00000..00099}.tar' --keep json,cls -o embedded/
The same command resumes it. A name may also be an address that fsspec opens (s3://, gs://, hf://).
"""

_SHEET = """\
To see the images with their classes: vit-client classify photos/ --sheet sheet.png
"""

_SIMILAR = """\
FILE is an output of `vit-client embed -o`, also the folder of a dataset in shards.

To see the images found: vit-client similar cat.jpg --to photos.npz --sheet alike.png
It reads the images under the names in FILE: run it in the folder where you ran `embed`.
"""

_KEPT = """\
To write one file, resumable if interrupted: vit-client embed photos/ -o photos.parquet --top-k 5
"""

_ENVIRONMENT = """\
Settings can also be given in the environment: VIT_URL, VIT_TIMEOUT, VIT_RETRIES, VIT_CONCURRENCY,
VIT_TOKEN, VIT_HEADERS ("name: value, …"), VIT_TLS, VIT_CA_FILE, VIT_CERT_FILE, VIT_KEY_FILE,
VIT_AUTHORITY.
"""

_EXIT_CODES = """\
exit codes:
  0    success, for all images
  1    some images could not be used; the others were processed
  2    wrong usage, or the output file contains other images
  3    server unreachable or overloaded, or no answer in time: try again later
  4    the server rejected the request or failed
  5    the output cannot be written (disk full, no permission)
  130  interrupted (a second Ctrl-C stops at once)
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=98)
        # Wide enough for the longest command: argparse ignores the indentation of commands.
        self._action_max_length = 18


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Like argparse's, but with long names shortened."""
        super().error(shortened(message, 400))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; exits with code 2 if it is invalid."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    top = parser()
    for argument in takewhile(lambda each: each != "--", given):
        if argument.startswith("-") and argument != "-" and os.path.lexists(argument):
            name = shortened(argument)
            top.error(
                f"{name} looks like an option, but is also a file here: for the file, write "
                f"./{name} (./*.jpg for a pattern), or -- before all names; for the option, change "
                "to another folder"
            )
    options, rest = top.parse_known_args(given)
    if rest:  # argparse would show the usage of vit-client as a whole
        options.verb.error(f"unrecognized arguments: {' '.join(rest)}")
    if problem := _does_not_fit(options):
        options.verb.error(problem)
    return options


def _does_not_fit(options: argparse.Namespace) -> str:
    """An error that argparse does not detect; "" if there is none."""
    given = vars(options)
    if "images" in given and not options.images and not options.files_from:
        return "the following arguments are required: IMAGE (or --files-from FILE)"
    if given.get("null") and not options.files_from:
        return "-0 needs --files-from"
    if given.get("overwrite") and not options.output:
        return "--overwrite needs -o"
    shards = [name for name in given.get("images") or () if is_shard(name)]
    if shards and not (options.task == "embed" and options.output):
        return f"{shards[0]} is a shard: vit-client embed {shards[0]} -o FOLDER/"
    if options.task == "embed" and (problem := _of_shards(options, shards)):
        return problem
    if options.task == "embed" and options.top_k and not options.output:
        return "--top-k needs -o; to print classes and embeddings, use vit-client analyze"
    return ""


def _of_shards(options: argparse.Namespace, shards: list[str]) -> str:
    """Options that go with shards only, and those that do not."""
    output = options.output or ""
    if shards and output.endswith((".npz", ".parquet", ".safetensors")):
        return f"-o {output}: of shards it is a folder: -o {output.rpartition('.')[0]}/"
    if shards or output.endswith("/"):
        others = {
            "--top-k": options.top_k,
            "--overwrite": options.overwrite,
            "--files-from": options.files_from,
            "--exclude": options.exclude,
        }
        return next((f"{name} does not go with shards" for name in others if others[name]), "")
    given = {
        "--keep": options.keep,
        "--image-column": options.image_column,
        "--dtype": options.dtype != "float32",
        "--max-failures": options.max_failures,
        "--part": options.part,
    }
    return next((f"{name} needs shards and -o FOLDER/" for name in given if given[name]), "")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = _Parser(
        "vit-client",
        description=_DESCRIPTION,
        epilog="\n".join([_IMAGES, _ENVIRONMENT, _EXIT_CODES]),
        formatter_class=_Help,
    )
    top.add_argument("--version", action="version", version=f"vit-client {__version__}")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _classify(verbs)
    _probabilities(verbs)
    _embed(verbs)
    _features(verbs)
    _analyze(verbs)
    _similar(verbs)
    _health(verbs)
    return top


def _classify(verbs: Any) -> None:
    verb = _verb(
        verbs, "classify", "the most likely classes, best first", answer, f"{_IMAGES}\n{_SHEET}"
    )
    _takes_images(verb)
    _takes_top_k(verb, 5, "number of classes (default: 5, or all if there are fewer)")
    _prints(verb, csv=True)
    _draws_sheet(
        verb, "also draw the images (up to 300) with their best classes, as a .png, .jpg, .pdf, …"
    )


def _probabilities(verbs: Any) -> None:
    verb = _verb(verbs, "probabilities", "the probability of every class", answer, _IMAGES)
    _takes_images(verb)
    _prints(verb, csv=True)


def _embed(verbs: Any) -> None:
    what = "an embedding for each image; similar images have similar embeddings"
    verb = _verb(verbs, "embed", what, _embed_anywhere, f"{_IMAGES}\n{_SHARDS}")
    _takes_images(verb)
    form = _prints(verb, csv=True)
    form.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write a .npz, .safetensors or .parquet file, or for shards a FOLDER/; the same "
        "command resumes it if interrupted",
    )
    _takes_top_k(
        verb, None, "also write the best N classes, from the same forward pass (.npz and .parquet)"
    )
    verb.add_argument(
        "--overwrite", action="store_true", help="replace FILE even if it contains other images"
    )
    shards = verb.add_argument_group("shards (-o FOLDER/)")
    shards.add_argument(
        "--keep",
        type=_names,
        default=[],
        metavar="NAME,…",
        help="fields of a tar (json,cls,txt) or columns of a table to keep beside each embedding",
    )
    shards.add_argument(
        "--image-column", metavar="NAME", help="column of images in a table, if there are several"
    )
    shards.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of the embeddings' numbers (default: float32)",
    )
    shards.add_argument(
        "--max-failures",
        type=_failures,
        metavar="N|P%",
        help="end the run if more images than this fail; P%% counts from the 100th image on",
    )
    shards.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="embed every N-th shard only, from the I-th: N processes share the work",
    )


def _features(verbs: Any) -> None:
    verb = _verb(
        verbs, "features", "a vector for each patch of an image", _features_anywhere, _IMAGES
    )
    _takes_images(verb)
    _prints(verb, csv=False)
    verb.add_argument(
        "-o", "--output", metavar="FILE", help="write the map to a .safetensors or .npz file"
    )
    verb.add_argument(
        "--picture",
        metavar="FILE",
        help="draw the image and its map, the first three principal components as colours",
    )


def _analyze(verbs: Any) -> None:
    what = "the most likely classes and the embedding, from a single forward pass"
    verb = _verb(verbs, "analyze", what, answer, f"{_IMAGES}\n{_KEPT}")
    _takes_images(verb)
    _takes_top_k(verb, 5, "number of classes (default: 5, or all if there are fewer)")
    _prints(verb, csv=False)


def _similar(verbs: Any) -> None:
    what = "the images most similar to a query, by cosine of their embeddings"
    verb = _verb(verbs, "similar", what, similar, _SIMILAR)
    verb.add_argument("query", metavar="IMAGE", help="file, or - for standard input")
    verb.add_argument(
        "--to", metavar="FILE", required=True, help="file or folder of embeddings to search"
    )
    verb.add_argument(
        "-n",
        "--number",
        type=_positive,
        default=10,
        metavar="N",
        help="number of images (default: 10)",
    )
    _prints(verb, csv=False)
    _draws_sheet(verb, "also draw the query and the images found, as a .png, .jpg, .pdf, …")


def _health(verbs: Any) -> None:
    what = "check that the server answers a real image, and show what it serves"
    verb = _verb(verbs, "health", what, health, "")
    _prints(verb, csv=False)


def _verb(verbs: Any, name: str, what: str, run: Any, about: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}{'' if what.endswith('?') else '.'}",
        epilog="\n".join(part for part in (about, _ENVIRONMENT, _EXIT_CODES) if part),
        formatter_class=_Help,
    )
    verb.set_defaults(run=run, task=name, verb=verb)
    verb.add_argument(
        "--url",
        metavar="HOST:PORT",
        help="address of the server (default: VIT_URL, else localhost:8001)",
    )
    verb.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="time limit for one request (default: VIT_TIMEOUT, else 60)",
    )
    return verb


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in ("shard", "key", "embedding", "model_version", "error"):
        if name in names:
            raise argparse.ArgumentTypeError(f"a part has a column {name!r} of its own")
    return names


def _failures(text: str) -> str:
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
        raise argparse.ArgumentTypeError(f"must be a number or a share (5%), not {text!r}")
    return text


def _part(text: str) -> str:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N, with I from 1 to N, not {text!r}")
    return text


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return number


def _takes_images(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("images", nargs="*", metavar="IMAGE", help="file, folder, pattern or -")
    verb.add_argument(
        "--files-from",
        metavar="FILE",
        help="read names of images from FILE, one per line (- for standard input)",
    )
    verb.add_argument(
        "-0",
        "--null",
        action="store_true",
        help="the names in FILE end with NUL, as find -print0 writes them",
    )
    verb.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out files and folders with this name or path when reading a folder; may be "
        "repeated",
    )


def _takes_top_k(verb: argparse.ArgumentParser, default: int | None, what: str) -> None:
    verb.add_argument("-k", "--top-k", type=_positive, default=default, metavar="N", help=what)


def _prints(verb: argparse.ArgumentParser, *, csv: bool) -> Any:
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, one object per line")
    if csv:
        form.add_argument("--csv", action="store_true", help="print a table with a header")
    return form


def _draws_sheet(verb: argparse.ArgumentParser, what: str) -> None:
    verb.add_argument("--sheet", metavar="PICTURE", help=what)


def _embed_anywhere(options: argparse.Namespace) -> int:
    output = options.output or ""
    if output.endswith("/") or (output and any(map(is_shard, options.images))):
        return embed_to_folder(options)
    return embed_to_file(options) if options.output else answer(options)


def _features_anywhere(options: argparse.Namespace) -> int:
    return features_to_file(options) if options.output or options.picture else answer(options)
