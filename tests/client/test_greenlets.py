"""Programs whose threads are replaced by greenlets."""

import subprocess
import sys
import textwrap

import pytest

EARLY = """
    from gevent import monkey
    monkey.patch_all({patched})
    import sys
    from vit_client import Client, ConfigurationError
    try:
        with Client(sys.argv[1]) as client:
            print(client.embed(b"P6 1 1 255\\n123").shape)
    except ConfigurationError as error:
        print(error)
"""
LATE = """
    import sys
    from vit_client import Client, ConfigurationError
    client = Client(sys.argv[1])
    from gevent import monkey
    monkey.patch_all({patched})
    try:
        print(client.embed(b"P6 1 1 255\\n123").shape)
    except ConfigurationError as error:
        print(error)
    client.close()
"""
USED = """
    import os, sys
    from vit_client import Client, ConfigurationError
    client = Client(sys.argv[1])
    client.embed(b"P6 1 1 255\\n123")
    from gevent import monkey
    monkey.patch_all({patched})
    try:
        print(client.embed(b"P6 1 1 255\\n123").shape)
    except ConfigurationError as error:
        print(error, flush=True)
        os._exit(0)  # what was begun with real threads cannot be ended with others
    client.close()
"""
ASYNC = """
    from gevent import monkey
    monkey.patch_all({patched})
    import asyncio, sys
    from vit_client import AsyncClient, ConfigurationError

    async def run():
        async with AsyncClient(sys.argv[1]) as client:
            print((await client.embed(b"P6 1 1 255\\n123")).shape)

    try:
        asyncio.run(run())
    except ConfigurationError as error:
        print(error)
"""


def said(code: str, url: str, patched: str) -> str:
    code = textwrap.dedent(code).format(patched=patched)
    command = [sys.executable, "-W", "ignore", "-c", code, url]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120).stdout


@pytest.mark.parametrize("code", [EARLY, LATE, USED, ASYNC], ids=["early", "late", "used", "async"])
@pytest.mark.parametrize("patched", ["", "select=False", "thread=False"])
def test_greenlets_are_refused_at_once(url: str, code: str, patched: str) -> None:
    """Otherwise a call would hang and ignore Ctrl-C."""
    assert "patch_all(thread=False, select=False)" in said(code, url, patched)


@pytest.mark.parametrize("code", [EARLY, LATE, USED, ASYNC], ids=["early", "late", "used", "async"])
def test_with_real_threads_gevent_may_stay(url: str, code: str) -> None:
    assert said(code, url, "thread=False, select=False") == "(64,)\n"
