"""What a directory holds and what made it: ``clipkit info``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.artifacts import MANIFEST, partial_path, read_manifest
from clipkit.errors import ArtifactError


@dataclass(frozen=True)
class Info:
    """A directory's manifest and the files beside it.

    Attributes:
        path: the directory.
        facts: what the manifest says, as plain data.
        files: size in bytes of each file, by its path relative to the directory.
    """

    path: Path
    facts: dict[str, Any]
    files: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"path": str(self.path), **self.facts, "files": self.files}


def describe(path: Path) -> Info:
    """Read what a run, checkpoint, store or index says of itself.

    A run that is not finished has no manifest yet; it is described by its last checkpoint.

    Raises:
        ArtifactError: there is no such directory, or it is not clipkit's.
    """
    if path.is_file():
        raise ArtifactError(f"{path} is a file, expected the directory of a run, store or index")
    files = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }
    if not (path / MANIFEST).exists() and (path / "config.toml").is_file():
        return Info(path, _unfinished_run(path), files)
    facts = read_manifest(path).to_dict()
    if partial_path(path).is_dir():
        facts["update"] = "interrupted; run the same command again to go on"
    return Info(path, facts, files)


def _unfinished_run(path: Path) -> dict[str, Any]:
    # By the names alone, so that looking at a run needs no torch.
    steps = [p for p in path.glob("step-*") if (p / MANIFEST).is_file()]
    if not steps:
        raise ArtifactError(f"{path} holds a run without a checkpoint; start it again")
    last = max(steps, key=lambda p: int(p.name.removeprefix("step-")))
    return read_manifest(last).to_dict() | {
        "kind": "run",
        "state": "not finished; --resume goes on",
    }
