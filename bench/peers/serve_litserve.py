"""The same model behind LitServe, with batching as in its documentation."""

import base64
import sys
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-untyped]
import network
from fastapi import Request
from network import MAX_BATCH, Pixels


class EmbedAPI(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.served = network.Served(Path(sys.argv[1]))

    def decode_request(self, request: Request) -> Pixels:
        return network.decode(base64.b64decode(request["image"]), self.served.size)

    def batch(self, inputs: list[Pixels]) -> list[Pixels]:
        return inputs

    def predict(self, batch: list[Pixels]) -> Any:
        return self.served.embed(batch)

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, list[float]]:
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    api = EmbedAPI(max_batch_size=MAX_BATCH, batch_timeout=0.01, api_path="/embed")
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
