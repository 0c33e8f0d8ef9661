"""Search embeddings by an image, with DuckDB: nothing is loaded, it reads the parts.

vit-client embed 'shards/{00000..00099}.tar' -o embedded/
pip install duckdb
python search_duckdb.py embedded/ cat.jpg
"""

import sys

import duckdb
from vit_client import Client

SEARCH = """
    SELECT shard, key, array_cosine_similarity(embedding::FLOAT[{size}], ?::FLOAT[{size}]) AS cosine
    FROM read_parquet(?)
    WHERE error IS NULL
    ORDER BY cosine DESC
    LIMIT ?
"""


def main(folder: str, image: str, number: str = "5") -> None:
    """Print the most similar images, best first."""
    parts = f"{folder.rstrip('/')}/*.parquet"
    stored = "SELECT DISTINCT model_version FROM read_parquet(?)"
    versions = {version for (version,) in duckdb.execute(stored, [parts]).fetchall()}
    with Client() as client:
        (item,) = client.stream([image])
    if versions != {item.model_version}:
        sys.exit(f"{folder} is of another model than the server's {item.model_version}: {versions}")
    search = SEARCH.format(size=len(item.result))
    found = duckdb.execute(search, [item.result.tolist(), parts, int(number)])
    for shard, key, cosine in found.fetchall():
        print(f"{cosine:7.4f}  {shard}: {key}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python search_duckdb.py FOLDER IMAGE [NUMBER]")
    main(*sys.argv[1:])
