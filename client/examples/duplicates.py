"""Find near-duplicate photos.

    python duplicates.py photos/ 0.95

Embeds every image below a folder in one pass, in bounded memory except for the embeddings
themselves, and prints the pairs whose cosine similarity is above a threshold.
"""

import sys
from pathlib import Path

import numpy as np
from vit_client import Client

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main(folder: str, threshold: str = "0.95") -> None:
    """Print the pairs, most similar first."""
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in SUFFIXES)
    names, rows = [], []
    with Client() as client:
        for item in client.stream(paths, task="embed", on_error="return"):
            if item.error is not None:
                print(f"skipped {item.error}", file=sys.stderr)
                continue
            names.append(str(item.image))
            rows.append(item.result / np.linalg.norm(item.result))
    if not rows:
        sys.exit(f"no images to compare in {folder}")
    cosines = np.triu(np.stack(rows) @ np.stack(rows).T, k=1)
    pairs = np.argwhere(cosines > float(threshold))
    for one, other in sorted(pairs.tolist(), key=lambda pair: -cosines[pair[0], pair[1]]):
        print(f"{cosines[one, other]:.3f}  {names[one]}  {names[other]}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python duplicates.py FOLDER [THRESHOLD]")
    main(*sys.argv[1:])
