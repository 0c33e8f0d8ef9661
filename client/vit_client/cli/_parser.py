"""Arguments and help."""

from __future__ import annotations

import argparse

from . import _verbs

_DESCRIPTION = """\
Ask a Triton server what is in images.

  vit-client classify cat.jpg              what is it? the best five classes
  vit-client classify photos/ --json       every image below a folder, JSON lines
  vit-client embed photos/ --csv           what is it like? a vector for each image
  vit-client features cat.jpg              where is what? a vector for each patch
"""

_EPILOG = """\
An IMAGE is a file, a folder (with all its subfolders), a quoted pattern such as 'img/**/*.jpg',
or - for one image on standard input.

Settings come from the environment too: VIT_URL, VIT_TIMEOUT, VIT_RETRIES, VIT_CONCURRENCY,
VIT_TOKEN, VIT_HEADERS ("name: value, …"), VIT_TLS, VIT_CA_FILE, VIT_CERT_FILE, VIT_KEY_FILE.

Exit codes: 0 all answered, 1 some images could not be used (the others were answered), 2 wrong
usage, 3 no server, no answer in time or overloaded (later may work), 4 the server refused or
failed, 130 interrupted.
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=98)


def parser() -> argparse.ArgumentParser:
    """All of the command line."""
    top = argparse.ArgumentParser(
        "vit-client", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Help
    )
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    classify = _verb(verbs, "classify", "the most likely classes, best first", csv=True)
    classify.add_argument(
        "-k", "--top-k", type=int, default=5, metavar="N", help="how many classes (default 5)"
    )
    _verb(verbs, "probabilities", "the probability of every class", csv=True)
    _verb(verbs, "embed", "a vector for each image; similar images have similar ones", csv=True)
    _verb(verbs, "features", "a vector for each patch of an image", csv=False)
    return top


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, *, csv: bool
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name, help=what, description=what.capitalize() + ".", epilog=_EPILOG, formatter_class=_Help
    )
    verb.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, pattern or -")
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object a line")
    if csv:
        form.add_argument("--csv", action="store_true", help="print a table with a header")
    _server(verb)
    verb.set_defaults(run=_verbs.answer, task=name)
    return verb


def _server(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--url", metavar="HOST:PORT", help="the server (VIT_URL, localhost:8001)")
    verb.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for one request (VIT_TIMEOUT, 60)"
    )
