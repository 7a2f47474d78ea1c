"""Stores and indexes of random vectors, in the form of today and of old."""

import faiss
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.artifacts import MANIFEST, Manifest, ModelRef, write_json
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.store.shards import SCHEMA
from tests.helpers.toys import records, unit_rows

DIM = 16


MODEL = ModelRef("toy", "a", "fingerprint-a", DIM)


POOL = unit_rows(400, DIM, seed=3)


QUERIES = unit_rows(20, DIM, seed=1)


def make_store(path, vectors):
    with EmbeddingStore.create(path, MODEL, shard_size=30) as writer:
        writer.append(vectors, records(len(vectors)))
        return writer.finish({"spec": "made up"})


def table(keys, **more):
    rows = records(len(keys))
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names if name in rows[0]}
    return pa.table({**columns, "key": list(keys), **more})


def old_index(path, vectors, spec):
    path.mkdir()
    index = faiss.index_factory(DIM, spec, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path / "index.faiss"))
    rows = pa.Table.from_pylist(records(len(vectors)), SCHEMA)
    pq.write_table(rows, path / "records.parquet")
    detail = {"spec": spec, "search": {}, "trained_on": 0}
    manifest = Manifest("index", MODEL, len(vectors), {"spec": "made up"}, detail, format=1)
    write_json(path / MANIFEST, manifest.to_dict())
    return path
