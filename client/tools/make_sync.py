"""Write vit_client/_sync.py from vit_client/_async.py.

    python client/tools/make_sync.py

`Client` has the methods of `AsyncClient` without `async`: same names, parameters, types and
docstrings, each forwarding to an AsyncClient on a background thread. Maintained
by hand, the two clients would drift apart. A test fails if the file is not up to date.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vit_client"

HEADER = '''\
"""`Client`. Generated from _async.py by tools/make_sync.py: change it there.

How it works is in _bridge.py: an AsyncClient on a thread of its own.
"""
# mypy: disable-error-code="overload-overlap, no-any-return"

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Generator, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from ._async import AsyncClient
from ._bridge import Bridge
from ._progress import Progress
from ._settings import ChannelOptions
'''

CLASS_DOC = [
    ("Use it in `async with`", "Use it in `with`"),
    (
        "shared by any number of tasks, and a connection costs more than a request. It belongs to "
        "the\n    event loop it is first used in.",
        "shared by any number of threads, and a connection costs more than a request. It does "
        "not\n    survive a fork: make it in the process that uses it.",
    ),
]

INIT_BODY = "self._bridge = Bridge(AsyncClient({arguments}))"
CLOSE_BODY = "self._bridge.close()"
STREAM_BODY = "return self._bridge.stream(self._bridge.client._batches({arguments}), on_error)"
BODY = "return self._bridge.run(self._bridge.client.{name}({arguments}))"


def generate() -> str:
    """The source of _sync.py, not yet formatted."""
    tree = ast.parse((PACKAGE / "_async.py").read_text())
    source = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "AsyncClient")
    methods = [method for node in source.body if (method := _method(node)) is not None]
    doc = ast.get_docstring(source, clean=False) or ""
    for old, new in CLASS_DOC:
        if old not in doc:
            raise SystemExit(f"the docstring of AsyncClient no longer says {old!r}")
        doc = doc.replace(old, new)
    body = [ast.Expr(ast.Constant(doc)), *methods]
    client = ast.ClassDef("Client", [], [], body, [])
    parts = [ast.unparse(_types(tree)), ast.unparse(ast.fix_missing_locations(client))]
    return HEADER + "\n".join(parts) + "\n"


def _types(tree: ast.Module) -> ast.ImportFrom:
    """`from .types import …`, which is the same for both clients."""
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return next(node for node in imports if node.level == 1 and node.module == "types")


def _method(node: ast.stmt) -> ast.FunctionDef | None:
    """The sync version of a public method; None for anything else."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    name = {"__aenter__": "__enter__", "__aexit__": "__exit__"}.get(node.name, node.name)
    if name.startswith("_") and not name.endswith("__"):
        return None
    returns = ast.parse(_sync_type(ast.unparse(node.returns or ast.Constant(None))), mode="eval")
    body: list[ast.stmt] = node.body
    if not any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
        doc = [ast.Expr(ast.Constant(text))] if (text := ast.get_docstring(node, False)) else []
        body = [*doc, *ast.parse(_body(name, node)).body]
    return ast.FunctionDef(
        name, node.args, body, node.decorator_list, returns.body, lineno=node.lineno
    )


def _sync_type(annotation: str) -> str:
    return (
        annotation.replace("AsyncGenerator[", "Generator[")
        .replace(", None]", ", None, None]")
        .replace("AsyncClient", "Client")
    )


def _body(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if name == "__enter__":
        return "return self"
    if name == "__exit__":
        return "self.close()"
    if name == "close":
        return CLOSE_BODY
    positional = [argument.arg for argument in node.args.args[1:]]
    if name == "stream":
        names = [*positional, *(argument.arg for argument in node.args.kwonlyargs)]
        return STREAM_BODY.format(arguments=", ".join(f"{name}={name}" for name in names))
    keywords = [f"{argument.arg}={argument.arg}" for argument in node.args.kwonlyargs]
    arguments = ", ".join([*positional, *keywords])
    if name == "__init__":
        return INIT_BODY.format(arguments=arguments)
    return BODY.format(name=name, arguments=arguments)


def main() -> None:
    path = PACKAGE / "_sync.py"
    path.write_text(generate())
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(path)], check=True)


if __name__ == "__main__":
    main()
