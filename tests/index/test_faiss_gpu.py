"""FAISS on a GPU gives the same hits. Here a copy on the CPU stands in for the GPU."""

import faiss
import numpy as np
import pytest

from clipkit.index import faiss_gpu as device
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from tests.helpers.indexes import DIM, MODEL, QUERIES, make_store
from tests.helpers.toys import unit_rows


@pytest.fixture
def fresh():
    device.gpu_count.cache_clear()
    device._resources.cache_clear()
    yield
    device.gpu_count.cache_clear()
    device._resources.cache_clear()


@pytest.fixture
def gpu(fresh, monkeypatch):
    """One GPU that is the CPU; the list takes the classes of the indexes copied to it."""
    copied = []

    def copy(resources, number, index):
        index = faiss.downcast_index(index)
        copied.append(type(index).__name__)
        if isinstance(index, faiss.IndexHNSW):
            raise RuntimeError("not implemented on GPU")
        return faiss.clone_index(index)

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", copy, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    return copied


@pytest.mark.parametrize("spec", ["Flat", "IVF8,Flat", "IVF8,SQ8", "HNSW8"])
def test_answers_are_the_same_with_a_gpu(gpu, tmp_path, monkeypatch, spec):
    store = make_store(tmp_path / "store", unit_rows(300, DIM))
    queries = np.tile(QUERIES, (4, 1))
    VectorIndex.build(store, tmp_path / "with", spec)
    assert ("IndexFlatIP" in gpu or "IndexFlat" in gpu) == spec.startswith("IVF")  # its cells
    with IndexWriter(tmp_path / "with") as writer:
        writer.remove(store.keys[:5])
        writer.commit()
    gpu.clear()
    index = VectorIndex.open(tmp_path / "with")
    few = index.search_vectors(queries[:20], 5)
    assert not gpu  # not for so few queries
    many = index.search_vectors(queries, 5)
    assert gpu
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    assert VectorIndex.open(tmp_path / "with").search_vectors(queries, 5) == many
    assert many[:20] == few
    VectorIndex.build(store, tmp_path / "without", spec)
    with IndexWriter(tmp_path / "without") as writer:
        writer.remove(store.keys[:5])
        assert writer.commit().search_vectors(queries, 5) == many


def test_without_a_gpu_nothing_is_copied(fresh):
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS supports GPUs")
    assert device.gpu_count() == 0
    assert device.to_gpu(faiss.IndexFlatIP(3)) is None


def test_a_package_that_is_covered_up_is_told(fresh, monkeypatch, capsys):
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    monkeypatch.setattr(device, "version", lambda name: "1.15.1")
    assert device.gpu_count() == 0
    assert "--force-reinstall --no-deps faiss-gpu" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["Flat", "IVF64,Flat", "IVF64,SQ8", "IVF64,PQ8x8", "HNSW16"])
def test_a_real_gpu_answers_as_the_cpu(tmp_path, monkeypatch, spec):
    if not device.gpu_count():
        pytest.skip("FAISS has no card here")
    store = make_store(tmp_path / "store", unit_rows(20_000, DIM))
    built = VectorIndex.build(store, tmp_path / "index", spec)
    queries = unit_rows(200, DIM, seed=2)
    on_gpu = built.search_vectors(queries, 10)
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    on_cpu = VectorIndex.open(tmp_path / "index").search_vectors(queries, 10)
    same = [
        len({h.key for h in a} & {h.key for h in b}) / 10
        for a, b in zip(on_gpu, on_cpu, strict=True)
    ]
    assert np.mean(same) > 0.99
    assert built.model == MODEL
