"""manifest.json: what a directory holds and what made it.

A directory is complete if and only if its ``manifest.json`` exists. It is written in a temporary
sibling, the manifest last, flushed to disk, then moved into place in one step, so that a reader
finds the old state or the new one and never half of either.
"""

import ctypes
import fcntl
import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from clipkit import __version__
from clipkit.errors import ArtifactError, ModelMismatchError

MANIFEST = "manifest.json"
FORMAT = 2  # in 1, which is read as well, an index is one segment
EXTERNAL = "external:"
"""Start of the fingerprint that stands for an unknown model."""
KINDS = ("run", "checkpoint", "features", "store", "index", "classifier")


@dataclass(frozen=True)
class ModelRef:
    """Which model made something.

    The fingerprint covers weights, activation, preprocessing and tokenizer; two references are
    compatible if and only if their fingerprints are equal, whatever names and precision say.
    """

    name: str
    weights: str
    fingerprint: str
    dim: int
    precision: str = field(default="fp32", compare=False)

    @classmethod
    def of_external(cls, dim: int) -> Self:
        """The unknown model of vectors that were computed outside clipkit: compatible with none."""
        return cls("external", "", f"{EXTERNAL}{uuid4().hex}", dim)

    @property
    def external(self) -> bool:
        """Whether the vectors came from outside clipkit without a model."""
        return self.fingerprint.startswith(EXTERNAL)

    def __str__(self) -> str:
        if self.external:
            return "an external model"
        label = f"{self.name}/{self.weights}" if self.weights else self.name
        return f"{label} ({self.fingerprint[:12]})"

    def require(self, other: "ModelRef", *, what: str, repair: str) -> None:
        """Refuse vectors of another model.

        Raises:
            ModelMismatchError: the fingerprints differ; ``what`` names the artifact made by this
                model, ``repair`` the command that mends it.
        """
        if self.fingerprint != other.fingerprint:
            raise ModelMismatchError(
                f"{what} was made by {self}, but the model at hand is {other}; {repair}"
            )


@dataclass(frozen=True)
class Manifest:
    """The manifest.json of a directory.

    Attributes:
        kind: one of ``KINDS``.
        model: the model that made it; None only for what no model made.
        count: how many items it holds (images, vectors, steps).
        source: where the content came from, and a fingerprint of it.
        detail: what only this kind has (for an index: FAISS factory string, search-time knobs).
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
        """As plain data, the content of manifest.json."""
        return asdict(self)

    def require_model(self) -> ModelRef:
        """The model that made it; raises ArtifactError where the manifest names none."""
        if self.model is None:
            raise ArtifactError(f"this {self.kind} names no model in its {MANIFEST}; make it again")
        return self.model


def is_complete(path: Path) -> bool:
    """Whether ``path`` is a finished directory of clipkit's."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path, kind: str | None = None) -> Manifest:
    """Read a directory's manifest and check that it is of the expected kind.

    Raises:
        ArtifactError: missing, half-written, damaged, of another kind, or of a newer format.
    """
    expected = f"a clipkit {kind}" if kind else "a clipkit run, store or index"
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(_what_is_there(path, expected)) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}), expected {expected}; make it again"
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


def _what_is_there(path: Path, expected: str) -> str:
    if not path.exists():
        half = partial_path(path)
        if half.is_dir():
            return (
                f"{path} is only half-written ({half} exists); "
                "run the command that makes it again, it goes on from there"
            )
        return f"{path} does not exist, expected {expected}"
    return f"{path} has no {MANIFEST}, expected {expected}; name such a directory or make it again"


def partial_path(path: Path) -> Path:
    """The temporary sibling in which ``path`` is written."""
    path = Path(os.path.abspath(path))
    return path.parent / f".{path.name}.partial"


class ArtifactWriter:
    """Writes a directory in a temporary sibling and moves it into place when finished.

    Args:
        path: where the directory shall stand.
        kind: its kind.
        replace: allow a complete directory of this kind to be replaced.
        resume: go on in a sibling left behind by an interrupted writer instead of emptying it,
            and leave it behind when interrupted.

    Raises:
        ArtifactError: ``path`` is taken or cannot be made, or another process is writing it.
    """

    def __init__(
        self, path: Path, kind: str, *, replace: bool = False, resume: bool = False
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.kind, self.resume = kind, resume
        self._refuse_strangers(replace)
        self.temp = partial_path(self.path)
        self._lock = DirectoryLock(self.temp.with_suffix(".lock"), self.path)
        if not resume:
            shutil.rmtree(self.temp, ignore_errors=True)
        self.temp.mkdir(exist_ok=True)

    def _refuse_strangers(self, replace: bool) -> None:
        if not self.path.exists():
            return
        if is_complete(self.path):
            found = read_manifest(self.path).kind
            if found == self.kind and replace:
                return
            raise ArtifactError(
                f"{self.path} already holds a clipkit {found}; name another place or remove it"
            )
        if not self.path.is_dir() or any(self.path.iterdir()):
            raise ArtifactError(
                f"{self.path} exists and is no clipkit {self.kind}; name another place for it"
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
        """Write the manifest, flush everything to disk and move the directory into place."""
        write_json(self.temp / MANIFEST, manifest.to_dict())
        sync_tree(self.temp)
        move_into_place(self.temp, self.path)


class DirectoryLock:
    """An advisory lock on a file, which the kernel releases when its process dies.

    The file is deleted on release, and a lock on a deleted file does not count. The package
    ``filelock`` leaves its lock files behind, beside every artifact.

    Args:
        file: the lock file, created with its parent directories if missing.
        guarded: the directory that it locks, named in the error.

    Raises:
        ArtifactError: another process holds it, or it cannot be made.
    """

    def __init__(self, file: Path, guarded: Path) -> None:
        self.file = file
        while True:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise ArtifactError(
                    f"{guarded} cannot be written ({error.strerror}); name another place"
                ) from None
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._fd)
                raise ArtifactError(
                    f"another process is writing {guarded}; wait for it or name another place"
                ) from None
            # The holder before us may have unlinked the file between our open and our lock.
            with suppress(FileNotFoundError):
                if os.fstat(self._fd).st_ino == os.stat(file).st_ino:
                    return
            os.close(self._fd)

    def release(self) -> None:
        """Let the next writer in."""
        self.file.unlink(missing_ok=True)
        os.close(self._fd)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented UTF-8 JSON, in place of what was there, in one step."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a whole UTF-8 file in one step; where that fails, what was there stays."""
    temp = file.with_name(f".{file.name}.tmp")
    try:
        temp.write_text(text, encoding="utf-8")
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
    """Rename ``temp`` to ``path``; what stood there goes away in the same step."""
    if path.is_dir() and any(path.iterdir()):
        _exchange(temp, path)
        shutil.rmtree(temp, ignore_errors=True)
    else:
        temp.rename(path)
    _sync(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories; in one step where the kernel can (Linux ``RENAME_EXCHANGE``)."""
    if sys.platform == "linux":
        at_cwd, exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if not libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange):
            return
    aside = one.with_suffix(".old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
