"""Rows gathered into shards, each written to disk while the next one fills."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clipkit.store.shards import Record, Vectors, as_table, write_shard


class ShardWriter:
    """Writes full shards in the background, one at a time.

    Encoding goes on meanwhile; where it is faster than the disk it waits for the shard before, so
    that memory holds two shards at most.

    Args:
        folder: where the shards lie.
        number: of the first one.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._vectors: list[Vectors] = []
        self._records: list[Record] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="clipkit-shards")
        self._under_way: tuple[Future[None], list[Vectors], list[Record]] | None = None

    def append(self, vectors: Vectors, records: list[Record], size: int) -> None:
        """Add rows, float32 [m, dim] and m records, and begin to write what fills ``size`` rows.

        Raises:
            OSError: the shard before could not be written.
        """
        self._vectors.extend(vectors)
        self._records.extend(records)
        while len(self._records) >= size:
            self._begin(size)

    def flush(self) -> None:
        """Write whatever is gathered, and wait until it is on disk.

        Raises:
            OSError: the disk is full or forbids it; the rows are kept for another try.
        """
        self.wait()
        if self._records:
            self._begin(len(self._records))
            self.wait()

    def wait(self) -> None:
        """Wait for the shard that is being written; raises OSError as ``flush`` does."""
        if self._under_way is None:
            return
        (future, vectors, records), self._under_way = self._under_way, None
        try:
            future.result()
        except OSError:
            self._vectors[:0], self._records[:0] = vectors, records
            self._number -= 1
            raise

    def close(self) -> None:
        """Let the thread go; what is not flushed is lost."""
        self._pool.shutdown()

    def _begin(self, rows: int) -> None:
        self.wait()
        vectors, records = self._vectors[:rows], self._records[:rows]
        future = self._pool.submit(self._write, self._number, vectors, records)
        self._under_way = future, vectors, records
        self._number += 1
        del self._vectors[:rows], self._records[:rows]

    def _write(self, number: int, vectors: list[Vectors], records: list[Record]) -> None:
        write_shard(self._folder, number, np.stack(vectors), as_table(records))
