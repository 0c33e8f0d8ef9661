"""The published weights, from the Hugging Face hub."""

import hashlib
import os
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from . import checkpoint
from .checkpoint import Checkpoint

NAME = "vit_reg4_m16_rms_avg_i-jepa-imagenet21k"
REPO = f"birder-project/{NAME}"
ENDPOINT: str | None = None  # huggingface_hub's own: $HF_ENDPOINT, else huggingface.co
# A branch may move, but its content is pinned: only the two files below are accepted.
REVISION = "main"
# The file was published twice: the same values with current and with legacy parameter names.
SHA256 = (
    "da47dc6bd4f41c347235beba92657b66148180141d0bd629169e84449b629fbb",
    "d6d9fc47ecbad04a83b178bcd2eeecbd77569cc2a17fbdf52e02feda54523c3f",
)


class HubUnreachable(Exception):
    """The hub does not answer: no network, or a proxy blocks it."""


class HubError(Exception):
    """The hub answered, but not with one of the two published files."""


def published() -> tuple[Checkpoint, str]:
    """Return the published checkpoint and its file's SHA-256, from the cache or else from the hub.

    The download is verified, then cached as safetensors in `$XDG_CACHE_HOME/vit-builder`.

    Raises:
        HubUnreachable: the hub does not answer.
        HubError: the hub did not return a published file.
    """
    for sha256 in SHA256:
        if (cached := _cached(sha256)).is_file():
            return checkpoint.load(cached), sha256
    with tempfile.TemporaryDirectory() as folder:
        downloaded = _download(Path(folder))
        sha256 = file_sha256(downloaded)
        if sha256 not in SHA256:
            raise HubError(
                f"{REPO}/{downloaded.name} has the SHA-256 {sha256}, which is not one of those "
                "published: "
                f"{' or '.join(SHA256)}"
            )
        loaded = checkpoint.load(downloaded)
    cached = _cached(sha256)
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f"{cached.name}.{os.getpid()}")
    try:
        checkpoint.save(loaded, partial)
        partial.replace(cached)
    finally:
        partial.unlink(missing_ok=True)
    return loaded, sha256


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _cached(sha256: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "vit-builder" / sha256 / f"{NAME}.safetensors"


def _download(folder: Path) -> Path:
    api = HfApi(endpoint=ENDPOINT)
    # Catches all: the HTTP library, and so its exceptions, varies by huggingface_hub version.
    try:
        # Fails within seconds without a network; the download itself would retry for long.
        api.repo_info(REPO, revision=REVISION, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError) as e:
        raise HubError(f"{REPO}: {_first_line(e)}") from e
    except Exception as e:
        raise HubUnreachable(f"{REPO}: {_first_line(e)}") from e
    try:
        return Path(api.hf_hub_download(REPO, f"{NAME}.pt", revision=REVISION, local_dir=folder))
    except Exception as e:
        raise HubError(f"{REPO}: {_first_line(e)}") from e


def _first_line(e: Exception) -> str:
    return next(iter(str(e.__cause__ or e).splitlines()), type(e).__name__)
