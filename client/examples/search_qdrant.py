"""Load embeddings into Qdrant, and search them by an image.

    vit-client embed 'shards/{00000..00099}.tar' -o embedded/
    pip install qdrant-client
    python search_qdrant.py load embedded/
    python search_qdrant.py cat.jpg

Without QDRANT_URL it uses the client's local mode, in the folder qdrant/. There is one collection
for each model, so that vectors of two models never meet.
"""

import itertools
import os
import sys
import uuid
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from qdrant_client import QdrantClient, models
from vit_client import Client


def connect() -> QdrantClient:
    """The server at QDRANT_URL, or a local folder."""
    url = os.environ.get("QDRANT_URL")
    return QdrantClient(url=url) if url else QdrantClient(path="qdrant")


def load(folder: str) -> None:
    """Insert all rows; again, for rows that are there already, changes nothing."""
    database = connect()
    for part in sorted(Path(folder).glob("*.parquet")):
        file = pq.ParquetFile(part)
        for batch in file.iter_batches(1000):
            rows = batch.filter(pc.is_null(batch["error"])).to_pylist()
            for version, group in itertools.groupby(rows, key=lambda row: row["model_version"]):
                insert(database, f"vit-{version}", list(group))
    database.close()


def insert(database: QdrantClient, collection: str, rows: list[dict]) -> None:
    """Insert rows of one model."""
    if not database.collection_exists(collection):
        size = len(rows[0]["embedding"])
        how = models.VectorParams(size=size, distance=models.Distance.COSINE)
        database.create_collection(collection, vectors_config=how)
    points = [
        models.PointStruct(
            id=str(uuid.uuid5(uuid.NAMESPACE_URL, f"{row['shard']}/{row['key']}")),
            vector=row["embedding"],
            payload={"shard": row["shard"], "key": row["key"]},
        )
        for row in rows
    ]
    database.upsert(collection, points)


def search(image: str, number: str = "5") -> None:
    """Print the most similar images, best first."""
    with Client() as client:
        (item,) = client.stream([image])
    database = connect()
    collection = f"vit-{item.model_version}"
    if not database.collection_exists(collection):
        sys.exit(f"nothing has been loaded of the server's model, {item.model_version}")
    found = database.query_points(collection, query=item.result.tolist(), limit=int(number))
    for point in found.points:
        print(f"{point.score:7.4f}  {point.payload['shard']}: {point.payload['key']}")
    database.close()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python search_qdrant.py load FOLDER, or IMAGE [NUMBER]")
    load(sys.argv[2]) if sys.argv[1] == "load" else search(*sys.argv[1:])
