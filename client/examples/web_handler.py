"""A web service that classifies the images posted to it.

    python web_handler.py 8080 &
    curl --data-binary @cat.jpg http://127.0.0.1:8080/

One AsyncClient serves all requests: many are in flight at once, and the server batches them. Each
error of the client is mapped to an HTTP status. The HTTP part is a minimum without dependencies;
`classify` is the part to reuse with aiohttp or FastAPI.
"""

import asyncio
import contextlib
import json
import sys
from http import HTTPStatus

from vit_client import AsyncClient, BadImage, Overloaded, Unavailable, VitClientError

MAX_BYTES = 20 << 20


async def classify(client: AsyncClient, image: bytes) -> tuple[HTTPStatus, object]:
    """Status and JSON body for one posted image."""
    try:
        guesses = await client.classify(image, top_k=3, timeout=5)
    except BadImage as error:
        return HTTPStatus.UNPROCESSABLE_ENTITY, {"error": error.reason}
    except (Overloaded, Unavailable) as error:
        return HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)}
    except TimeoutError as error:
        return HTTPStatus.GATEWAY_TIMEOUT, {"error": str(error)}
    except VitClientError as error:
        return HTTPStatus.BAD_GATEWAY, {"error": str(error)}
    return HTTPStatus.OK, [{"label": guess.label, "score": guess.score} for guess in guesses]


async def serve(client: AsyncClient, host: str, port: int) -> asyncio.Server:
    """Start a small HTTP server."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [
            int(line.partition(b":")[2])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        ]
        size = lengths[0] if lengths else 0
        body: object
        if size > MAX_BYTES:
            status, body = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": "image too large"}
        else:
            status, body = await classify(client, await reader.readexactly(size))
        data = json.dumps(body, ensure_ascii=False).encode()
        writer.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        )
        writer.write(data)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(handle, host, port)


async def main(port: int) -> None:
    """Run until Ctrl-C."""
    async with AsyncClient() as client, await serve(client, "127.0.0.1", port) as server:
        host, port = server.sockets[0].getsockname()
        print(f"http://{host}:{port}/", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8080))
