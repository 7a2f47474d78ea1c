"""Kill a writer at every step it takes on the disk; run by the test of it, in a process of its
own, which forks once for each step.

``sys.addaudithook`` sees every file that Python opens to write, renames and deletes; what FAISS and
Arrow write is seen by wrapping their functions. At step n the child ends at once, before the step,
as ``kill -9`` would end it, and once more with half of the file there.
"""

import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import faiss
import pyarrow.parquet as pq

from clipkit.artifacts import MANIFEST
from clipkit.errors import ClipkitError
from clipkit.index.merge import merge_indexes
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from tests.helpers.indexes import MODEL, POOL, make_store, old_index, table
from tests.helpers.toys import unit_rows

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def change(path, **options):
    with IndexWriter(path) as writer:
        writer.remove(["item-00003.png", "item-00017.png"])
        writer.append(POOL[:5], table([f"new-{n}" for n in range(5)]))
        writer.commit(**options)


def only_remove(path):
    with IndexWriter(path) as writer:
        writer.remove(["item-00003.png", "later-1"])
        writer.commit()


def rebuild(path):
    store = EmbeddingStore.open(path.parent / "other")
    VectorIndex.build(store, path, "HNSW8", replace=True)


def merge(path):
    merge_indexes([path.parent / "index", path.parent / "second"], path)


def sync(path):
    # Here, because a process without torch forks in a tenth of the time.
    from clipkit.tasks.sync import sync_index
    from tests.helpers.toys import ColourEncoder

    sync_index(path, encoder=ColourEncoder(), workers=1)


VERBS = {
    "sync": sync,
    "change": change,
    "compact": lambda path: change(path, compact=True),
    "remove": only_remove,
    "change-old": change,
    "build": rebuild,
    "merge": merge,
}


def state(path):
    """All that an index says, after checking that it is of one piece; None where there is none."""
    if not path.exists():
        return None
    index = VectorIndex.open(path)
    assert len(index) == len(index.keys) == len(index.records())
    hits_of = index.search_vectors(unit_rows(20, index.dim), 8)
    answers = [[(hit.key, hit.id) for hit in hits] for hits in hits_of]
    return index.keys, index.spec, answers


def prepare(folder):
    """An index with a life behind it: a base, a later segment, removed rows in both."""
    store = make_store(folder / "store", unit_rows(40, MODEL.dim))
    VectorIndex.build(store, folder / "index", "SQ8")
    with IndexWriter(folder / "index") as writer:
        writer.append(POOL[20:40], table([f"later-{n}" for n in range(20)]))
        writer.commit()
        writer.remove(["item-00008.png", "later-3"])
        writer.commit()
    other = make_store(folder / "other", POOL[:30])
    VectorIndex.build(other, folder / "second", "SQ8")
    old_index(folder / "old", unit_rows(40, MODEL.dim), "Flat")


def prepare_sync(folder):
    """An index of a folder that has changed since; its copies have that folder as their root."""
    from clipkit.tasks.index import build_index
    from tests.helpers.toys import ColourEncoder, square, write_squares

    write_squares(folder / "photos", per_colour=1)
    build_index(folder / "photos", folder / "synced", spec="HNSW8", encoder=ColourEncoder())
    (folder / "photos" / "red" / "red-0.png").unlink()
    (folder / "photos" / "blue" / "blue-0.png").rename(folder / "photos" / "blue" / "moved.png")
    square("green", shade=50).save(folder / "photos" / "green" / "new.png")
    square("cyan", shade=50).save(folder / "photos" / "cyan" / "cyan-0.png")


class Killer:
    """Ends the process at the n-th step below a folder."""

    def __init__(self, folder, at):
        self.folder, self.left = str(folder), at
        sys.addaudithook(self._audit)
        for module, name in ((faiss, "write_index"), (pq.ParquetWriter, "__init__")):
            setattr(module, name, self._wrap(getattr(module, name)))

    def _audit(self, event, args):
        if event not in EVENTS or not str(args[0]).startswith(self.folder):
            return
        if event != "open":
            self.step()
        elif args[2] & (os.O_WRONLY | os.O_RDWR):
            self.step(str(args[0]))

    def _wrap(self, function):
        def wrapped(one, file, *args, **kwargs):
            self.step(file if isinstance(file, str | Path) else None)
            return function(one, file, *args, **kwargs)

        return wrapped

    def step(self, file=None):
        if self.left == 0:
            os._exit(9)
        self.left -= 1
        if self.left == 0 and file:
            self.left = -1  # writing is no step of the writer's
            Path(file).write_bytes(b"half of it")
            os._exit(9)
        self.left -= bool(file)


def killed(verb, path, at):
    """Whether the verb was killed before it came to its end."""
    child = os.fork()
    if not child:
        code = 1
        try:
            Killer(path.parent, at)
            verb(path)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the verb failed at step {at}"
    return code == 9


def main(name, place, stride):
    verb, place = VERBS[name], Path(place)
    (prepare_sync if name == "sync" else prepare)(place / "template")
    names = {"change-old": "old", "sync": "synced", "merge": "merged"}
    index_name = names.get(name, "index")
    shutil.copytree(place / "template", place / "done")
    old = state(place / "done" / index_name)
    verb(place / "done" / index_name)
    new = state(place / "done" / index_name)
    assert old != new
    seen, at = [], 0
    while True:
        folder = place / "work"
        shutil.copytree(place / "template", folder)
        path = folder / index_name
        ended = not killed(verb, path, at)
        found = state(path)
        assert found in (old, new), f"a half state after step {at}"
        seen.append(found == new)
        if ended:
            break
        # The next writer works, whatever lies about, and leaves nothing behind but the index.
        if name == "merge":
            for source in ("index", "second"):
                assert state(folder / source) == state(place / "template" / source)
            if found is None:
                verb(path)
            assert state(path) == new
        elif name != "build":
            try:
                verb(path)
            except ClipkitError:
                assert found == new, "the change was made, and cannot be made twice"
                with IndexWriter(path) as writer:
                    writer.remove(writer.index.keys[:1])
                    writer.commit()
            index = VectorIndex.open(path)
            parts = [name for segment in index.segments for name in segment.parts.names]
            assert sorted(os.listdir(path)) == sorted([MANIFEST, *parts])
            assert sorted(os.listdir(folder)) == sorted(os.listdir(place / "template"))
        shutil.rmtree(folder)
        at += int(stride)
    assert seen == sorted(seen), "once the new state is there it stays"
    assert seen[-1]
    assert seen.count(False) >= 3
    print(len(seen))


def race(place, seconds):
    """Change an index without end, until killed; for readers and for kill -9 at random times."""
    path, number = Path(place), 0
    until = time.monotonic() + float(seconds)
    while time.monotonic() < until:
        with IndexWriter(path) as writer:
            index = writer.index
            first = [key for key in index.keys if key.startswith("pair-")]
            writer.remove(first)
            keys = [f"pair-{os.getpid()}-{number}-{side}" for side in "ab"]
            writer.append(POOL[number % 200 : number % 200 + 2], table(keys))
            writer.commit(compact=number % 3 == 0)
        number += 1


if __name__ == "__main__":
    {"main": main, "race": race}[sys.argv[1]](*sys.argv[2:])
