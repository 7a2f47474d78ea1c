"""What a user writes: the public API in a strictly typed script; see tests/test_public_api.py."""

from pathlib import Path

import numpy as np
from PIL import Image

import clipkit

index = clipkit.open_index("index")
hits: clipkit.Hits = index.search("a dog on grass", k=5, where="year >= 2023")
table = hits.to_pandas()
key: str = hits[0].key
score: float = hits[0].score
several: list[clipkit.Hits] = index.search(["a dog", "a cat"], minus=["people"], minus_weight=0.8)
alike = index.search(image="a.jpg", image_weight=0.5, distinct=True)

encoder: clipkit.Encoder = clipkit.load_model("ViT-B-32/laion2b_s34b_b79k")
array = np.zeros((224, 224, 3), np.uint8)
vectors = encoder.encode_images(["a.jpg", Path("b.jpg"), Image.new("RGB", (9, 9)), array])
query = encoder.encode_text("a dog")
similarity: float = float((vectors @ query).max())

store: clipkit.EmbeddingStore = clipkit.embed("photos", "store", encoder)
index = clipkit.build_index("photos", "index", encoder)
changes: clipkit.Changes = clipkit.add_images(index, Path("more"))
own = clipkit.VectorIndex.from_vectors(vectors, ["a", "b", "c", "d"], metadata=None)

predictions: clipkit.Predictions = clipkit.classify("photos", ["dog", "cat"], encoder)
label: str = predictions[0].label
report: clipkit.Report = clipkit.evaluate_retrieval("pairs.csv", encoder)
recall: float = report.estimates["text_to_image_recall@1"].value
report = clipkit.evaluate_zero_shot("albums", encoder, labels=["dog", "cat"])
comparison: clipkit.Comparison = clipkit.compare("run", encoder, "pairs.csv")
print(table, key, score, several, alike, similarity, store, changes, own, label, recall)
print(comparison.verdict, clipkit.info("run").facts)

try:
    starter: clipkit.StarterConfig = clipkit.init_config("photos", "photos.toml")
    result: clipkit.TrainResult = clipkit.train(
        clipkit.load_config(Path("photos.toml")), Path("run")
    )
except (clipkit.ConfigError, clipkit.DataError) as error:
    print(error)
