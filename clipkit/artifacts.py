"""Artifacts: directories with a ``manifest.json`` that names their content and their model.

A directory is complete if and only if its ``manifest.json`` exists. A writer fills a temporary
sibling directory, writes the manifest last, flushes everything to disk and renames the directory
atomically. A reader therefore sees either the old state or the new one.
"""

import ctypes
import fcntl
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from clipkit import __version__
from clipkit.errors import ArtifactError, ModelMismatchError

MANIFEST = "manifest.json"
FORMAT = 2  # format 1 is still readable; its indexes have a single segment
EXTERNAL = "external:"
"""Prefix of the fingerprint of an unknown model."""
KINDS = ("run", "checkpoint", "features", "store", "index", "classifier")


@dataclass(frozen=True)
class ModelRef:
    """Identifies the model that an artifact was built with.

    The fingerprint covers weights, activation, preprocessing and tokenizer. Two references are
    compatible if and only if their fingerprints are equal; name and precision do not matter.
    """

    name: str
    weights: str
    fingerprint: str
    dim: int
    precision: str = field(default="fp32", compare=False)

    @classmethod
    def of_external(cls, dim: int) -> Self:
        """The unknown model of vectors computed outside clipkit; compatible with no other model."""
        return cls("external", "", f"{EXTERNAL}{uuid4().hex}", dim)

    @property
    def external(self) -> bool:
        """Whether the vectors were computed outside clipkit, by an unknown model."""
        return self.fingerprint.startswith(EXTERNAL)

    def __str__(self) -> str:
        if self.external:
            return "an external model"
        label = f"{self.name}/{self.weights}" if self.weights else self.name
        return f"{label} ({self.fingerprint[:12]})"

    def require(self, other: "ModelRef", *, what: str, repair: str) -> None:
        """Check that ``other`` is the same model.

        Raises:
            ModelMismatchError: the fingerprints differ. The message says that ``what`` was built
                with this model, and suggests ``repair``.
        """
        if self.fingerprint != other.fingerprint:
            raise ModelMismatchError(
                f"{what} was built with {self}, but the given model is {other}; {repair}"
            )


@dataclass(frozen=True)
class Manifest:
    """The manifest.json of a directory.

    Attributes:
        kind: one of ``KINDS``.
        model: the model it was built with; None if no model was involved.
        count: number of items (images, vectors or steps).
        source: origin of the content, and its fingerprint.
        detail: fields specific to the kind (an index: FAISS factory string, search parameters).
    """

    kind: str
    model: ModelRef | None
    count: int
    source: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    clipkit: str = __version__
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_dict(self) -> dict[str, Any]:
        """The content of manifest.json as plain data."""
        return asdict(self)

    def require_model(self) -> ModelRef:
        """The model it was built with; raises ArtifactError if the manifest names none."""
        if self.model is None:
            raise ArtifactError(f"{MANIFEST} of this {self.kind} does not name a model; rebuild it")
        return self.model


def is_complete(path: Path) -> bool:
    """Whether ``path`` is a complete clipkit directory."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path, kind: str | None = None) -> Manifest:
    """Read a directory's manifest and check that it is of the expected kind.

    Raises:
        ArtifactError: the manifest is missing, half-written, damaged, of another kind, or of a
            newer format.
    """
    expected = f"a clipkit {kind}" if kind else "a clipkit run, store or index"
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(_what_is_there(path, expected, kind)) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}), expected {expected}; rebuild it"
        ) from None
    try:
        if raw["format"] > FORMAT:
            raise ArtifactError(
                f"{path} has format {raw['format']}, this clipkit reads up to {FORMAT}; "
                f"upgrade clipkit to at least {raw['clipkit']}"
            )
        model = ModelRef(**raw.pop("model")) if raw["model"] else raw.pop("model")
        manifest = Manifest(model=model, **raw)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is not a clipkit manifest ({error}), expected {expected}"
        ) from None
    if kind and manifest.kind != kind:
        raise ArtifactError(f"{path} holds a clipkit {manifest.kind}, expected {expected}")
    return manifest


def _what_is_there(path: Path, expected: str, kind: str | None) -> str:
    if not path.exists():
        half = partial_path(path)
        if half.is_dir():
            return (
                f"{path} is only half-written ({half} exists); "
                "run the same command again to continue"
            )
        return f"{path} does not exist, expected {expected}"
    if kind == "index":
        build = f"clipkit index build {shlex.quote(str(path))} --out INDEX"
        return f"{path} has no {MANIFEST}, expected {expected}; to index its images, run `{build}`"
    return f"{path} has no {MANIFEST}, expected {expected}; choose another directory or rebuild it"


def partial_path(path: Path) -> Path:
    """The temporary sibling directory in which a writer builds ``path``."""
    path = Path(os.path.abspath(path))
    return path.parent / f".{path.name}.partial"


class ArtifactWriter:
    """Writes a directory in a temporary sibling and renames it when finished.

    Args:
        path: the directory to write.
        kind: its kind.
        replace: replace an existing complete directory of the same kind.
        resume: continue in the temporary directory of an interrupted writer instead of emptying
            it, and keep that directory if interrupted.

    Raises:
        ArtifactError: ``path`` is taken or cannot be created, or another process is writing it.
    """

    def __init__(
        self, path: Path, kind: str, *, replace: bool = False, resume: bool = False
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.kind, self.resume = kind, resume
        self._refuse_foreign(replace)
        self.temp = partial_path(self.path)
        self._lock = DirectoryLock(self.temp.with_suffix(".lock"), self.path)
        if not resume:
            shutil.rmtree(self.temp, ignore_errors=True)
        self.temp.mkdir(exist_ok=True)

    def _refuse_foreign(self, replace: bool) -> None:
        if not self.path.exists():
            return
        if is_complete(self.path):
            found = read_manifest(self.path).kind
            if found == self.kind and replace:
                return
            raise ArtifactError(
                f"{self.path} already holds a clipkit {found}; choose another path or remove it"
            )
        if not self.path.is_dir() or any(self.path.iterdir()):
            raise ArtifactError(
                f"{self.path} exists and is not a clipkit {self.kind}; choose another path"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.resume:
            shutil.rmtree(self.temp, ignore_errors=True)
        self._lock.release()

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, flush everything to disk and rename the directory to ``path``."""
        write_json(self.temp / MANIFEST, manifest.to_dict())
        sync_tree(self.temp)
        move_into_place(self.temp, self.path)


class DirectoryLock:
    """An advisory file lock that the kernel releases when the process dies.

    The lock file is deleted on release, and a lock on a deleted file is ignored. The package
    ``filelock`` would leave a lock file beside every artifact.

    Args:
        file: the lock file, created with its parent directories if missing.
        guarded: the directory that it protects, named in the error.

    Raises:
        ArtifactError: another process holds the lock, or the file cannot be created.
    """

    def __init__(self, file: Path, guarded: Path) -> None:
        self.file = file
        while True:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise ArtifactError(
                    f"{guarded} cannot be written ({error.strerror}); choose another path"
                ) from None
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._fd)
                raise ArtifactError(
                    f"another process is writing {guarded}; wait for it or choose another path"
                ) from None
            # The holder before us may have unlinked the file between our open and our lock.
            with suppress(FileNotFoundError):
                if os.fstat(self._fd).st_ino == os.stat(file).st_ino:
                    return
            os.close(self._fd)

    def release(self) -> None:
        """Delete the lock file and release the lock."""
        self.file.unlink(missing_ok=True)
        os.close(self._fd)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented UTF-8 JSON, replacing the file atomically."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Replace a UTF-8 text file atomically; on failure the old content remains."""
    with replacing(file) as temp:
        temp.write_text(text, encoding="utf-8")


@contextmanager
def replacing(file: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A temporary path; what is written there replaces ``file`` at the end of the ``with`` block.

    On failure the old content remains, and the partial file is deleted.

    Args:
        file: the file to replace or create.
        durable: flush to disk first, so that a power failure cannot leave an empty file.
        shared: several processes may write the file at once, so the temporary name is random.
    """
    temp = file.with_name(f".{file.name}.tmp")
    if shared:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        os.close(handle)
        temp = Path(name)
    try:
        yield temp
        if durable:
            _sync(temp)
        temp.replace(file)
    finally:
        temp.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Flush every file and directory below ``path`` to disk."""
    for folder, _, files in os.walk(path):
        for name in [*files, "."]:
            _sync(os.path.join(folder, name))


def _sync(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def move_into_place(temp: Path, path: Path) -> None:
    """Rename ``temp`` to ``path``, atomically replacing an existing directory."""
    if path.is_dir() and any(path.iterdir()):
        _exchange(temp, path)
        shutil.rmtree(temp, ignore_errors=True)
    else:
        temp.rename(path)
    _sync(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories, atomically if the kernel can (Linux ``RENAME_EXCHANGE``)."""
    if sys.platform == "linux":
        at_cwd, exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if not libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange):
            return
    aside = one.with_suffix(".old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
