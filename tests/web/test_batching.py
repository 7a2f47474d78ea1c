"""The batcher alone: which items share a call, and how an error affects the others."""

import asyncio
import threading

import numpy as np
import pytest

from clipkit.index import search as flat
from clipkit.index.vector_index import VectorIndex
from clipkit.web.batching import Batcher
from clipkit.web.collection import Collection
from clipkit.web.schemas import RequestError
from clipkit.web.service import _search_batch, _VectorSearch
from tests.helpers.toys import unit_rows
from tests.helpers.web_toys import ServedEncoder, build


class Slow:
    """Doubles numbers, each call as long as its gate is closed; refuses 13."""

    def __init__(self):
        self.calls, self.gate, self.begun = [], threading.Event(), threading.Event()

    def __call__(self, items):
        self.calls.append(list(items))
        self.begun.set()
        assert self.gate.wait(10)
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]


def test_waiting_items_share_a_call():
    work = Slow()

    async def ask():
        batcher = Batcher(work, max_batch=4)
        first = asyncio.create_task(batcher(0))
        await asyncio.to_thread(work.begun.wait)
        rest = [asyncio.create_task(batcher(n)) for n in range(1, 8)]
        await asyncio.sleep(0)
        work.gate.set()
        found = await asyncio.gather(first, *rest)
        batcher.close()
        return found

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert work.calls == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_an_error_reaches_only_its_own_item():
    work = Slow()

    async def ask():
        batcher = Batcher(work)
        first = asyncio.create_task(batcher(0))
        await asyncio.to_thread(work.begun.wait)
        rest = [asyncio.create_task(batcher(n)) for n in (1, 13, 2)]
        await asyncio.sleep(0)
        work.gate.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    zero, one, thirteen, two = asyncio.run(ask())
    assert (zero, one, two) == (0, 2, 4)
    assert isinstance(thirteen, ValueError)


def test_cancelled_items_are_skipped_and_too_many_are_refused():
    work = Slow()

    async def ask():
        batcher = Batcher(work, max_waiting=2)
        first = asyncio.create_task(batcher(0))
        await asyncio.to_thread(work.begun.wait)
        gone, stays = asyncio.create_task(batcher(1)), asyncio.create_task(batcher(2))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="try again in a moment") as refusal:
            await batcher(3)
        assert refusal.value.status == 503
        gone.cancel()
        await asyncio.sleep(0)
        work.gate.set()
        assert (await first, await stays) == (0, 4)
        batcher.close()

    asyncio.run(ask())
    assert work.calls == [[0], [2]]


def test_closing_finishes_waiting_items():
    work = Slow()

    async def ask():
        batcher = Batcher(work)
        tasks = [asyncio.create_task(batcher(n)) for n in range(3)]
        await asyncio.to_thread(work.begun.wait)
        threading.Timer(0.05, work.gate.set).start()
        await asyncio.to_thread(batcher.close)
        with pytest.raises(RequestError, match="shutting down"):
            await batcher(3)
        return await asyncio.gather(*tasks)

    assert asyncio.run(ask()) == [0, 2, 4]


def test_searches_that_wait_together_go_through_one_product(tmp_path, monkeypatch):
    products, search_exact = [], flat.search_exact

    def noting(queries, blocks, k):
        products.append((len(queries), k))
        return search_exact(queries, blocks, k)

    monkeypatch.setattr(flat, "search_exact", noting)
    collection = Collection(VectorIndex.open(build(tmp_path)), ServedEncoder())
    red = np.array([key.startswith("red/") for key in collection.keys])
    wanted = [_VectorSearch(collection, vector, 16, "", None) for vector in unit_rows(5, 3)]
    wanted.insert(2, _VectorSearch(collection, wanted[0].vector, 3, "label = 'red'", red))
    found = _search_batch(wanted)
    assert products[0] == (5, 16)
    assert all(count == 1 for count, _ in products[1:])
    for one, hits in zip(wanted, found, strict=True):
        assert hits == collection.search(one.vector[None], one.k, one.mask)[0]
