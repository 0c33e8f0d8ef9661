"""Search embeddings by an image, with FAISS.

    vit-client embed 'shards/{00000..00099}.tar' -o embedded/
    pip install faiss-cpu
    python search_faiss.py embedded/ cat.jpg

Loads the parts one after the other; the index holds all embeddings in memory.
"""

import json
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from vit_client import Client, ModelChanged


def load(folder: str) -> tuple[faiss.Index, list[str], str]:
    """The index, the key of each of its rows, and the version of the model."""
    index, keys, versions = None, [], set()
    for part in sorted(Path(folder).glob("*.parquet")):
        good = pc.field("error").is_null()
        table = pq.read_table(part, columns=["shard", "key", "embedding"], filters=good)
        versions.add(json.loads(pq.read_schema(part).metadata[b"model"])["model_version"])
        if not len(table):
            continue
        numbers = table["embedding"].combine_chunks().flatten().to_numpy()
        rows = numbers.reshape(len(table), -1).astype(np.float32)
        faiss.normalize_L2(rows)  # the inner product is then the cosine
        index = index or faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        keys += [f"{row['shard']}: {row['key']}" for row in table.select([0, 1]).to_pylist()]
    if len(versions) != 1:
        sys.exit(f"{folder} has embeddings of {len(versions)} models; one is needed")
    if index is None:
        sys.exit(f"{folder} has no embeddings, but errors")
    return index, keys, versions.pop()


def main(folder: str, image: str, number: str = "5") -> None:
    """Print the most similar images, best first."""
    index, keys, version = load(folder)
    with Client() as client:
        try:
            query = next(client.stream([image], model_version=version)).result[None].copy()
        except ModelChanged as error:
            sys.exit(f"{folder} is of another model than the server's: {error}")
    faiss.normalize_L2(query)
    cosines, found = index.search(query, min(int(number), len(keys)))
    for cosine, row in zip(cosines[0], found[0], strict=True):
        print(f"{cosine:7.4f}  {keys[row]}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python search_faiss.py FOLDER IMAGE [NUMBER]")
    main(*sys.argv[1:])
