"""What a directory holds and what built it: ``clipkit info``."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from clipkit.artifacts import MANIFEST, partial_path, read_manifest
from clipkit.errors import ArtifactError


@dataclass(frozen=True)
class Info:
    """A directory's manifest and the files beside it.

    Attributes:
        path: the directory.
        facts: the manifest as plain data.
        files: size of each file in bytes, by its path relative to the directory.
    """

    path: Path
    facts: dict[str, Any]
    files: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"path": str(self.path), **self.facts, "files": self.files}

    def lines(self) -> list[tuple[str, Any]]:
        """Names and values for display, without empty values and lists."""
        files = [(f"file {name}", f"{size:,} bytes") for name, size in self.files.items()]
        return [("path", self.path), *_flatten(self.facts), *files]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
            for name, value in self.lines()
        )
        return f"<table>{rows}</table>"


def info(path: str | Path) -> Info:
    """Read the manifest and list the files of a run, checkpoint, store, index or classifier.

    An unfinished run has no manifest yet; its last checkpoint describes it.

    Raises:
        ArtifactError: the directory does not exist or is not a clipkit artifact.
    """
    path = Path(path)
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
        facts["update"] = "interrupted; run the same command again to continue"
    return Info(path, facts, files)


def _unfinished_run(path: Path) -> dict[str, Any]:
    # By file names alone: describing a run must not load torch.
    steps = [step for step in path.glob("step-*") if (step / MANIFEST).is_file()]
    if not steps:
        raise ArtifactError(f"{path} holds a run without a checkpoint; restart the training")
    last = max(steps, key=lambda step: int(step.name.removeprefix("step-")))
    state = {"kind": "run", "state": "not finished; continue with --resume"}
    return read_manifest(last).to_dict() | state


def _flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested names joined by spaces."""
    lines: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += _flatten(value, "" if name == "detail" else f"{prefix}{name} ")
        elif isinstance(value, float):
            lines.append((f"{prefix}{name}", f"{value:.4g}"))
        elif value not in (None, "") and not isinstance(value, list):
            lines.append((f"{prefix}{name}", value))
    return lines
