"""A walk through the client, cell by cell as in a notebook.

    python walk.py photos/

Each `# %%` is a cell: Jupyter (with jupytext), VS Code and PyCharm run this file as a notebook.
"""

# %% A client. It takes the address from VIT_URL, or localhost:8001.
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from vit_client import Client

client = Client()
print(client.model())

# %% Some photos.
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "photos")
photos = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
print(len(photos), "photos")

# %% Classify: the three most likely classes of one photo.
for guess in client.classify(photos[0], top_k=3):
    print(f"{guess.score:6.1%}  {guess.label}")

# %% An image may also be a PIL image or an array: here, the left half of a photo.
with Image.open(photos[0]) as photo:
    half = photo.crop((0, 0, photo.width // 2, photo.height))
print(client.classify(half, top_k=1))
print(client.classify(np.asarray(half.convert("RGB")), top_k=1))

# %% Embed: a vector per photo; the cosine of two vectors is the similarity of the photos.
embeddings = client.embed(photos)
embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
print(np.round(embeddings @ embeddings.T, 2))

# %% Feature map: a vector per patch. Which patches are similar to the one in the middle?
neck = client.features(photos[0])["neck"]
depth, rows, columns = neck.shape
patches = neck.reshape(depth, -1).T
patches /= np.linalg.norm(patches, axis=1, keepdims=True)
alike = patches @ patches[(rows // 2) * columns + columns // 2]
for row in alike.reshape(rows, columns):
    print("".join(" .:-=+*#%@"[int(9 * max(0, value))] for value in row))

# %% More images than fit in memory: any iterable, in order. Broken files are skipped here.
for item in client.stream(folder.rglob("*.jpg"), task="classify", top_k=1, on_error="skip"):
    print(item.image.name, item.result[0].label)

# %%
client.close()
