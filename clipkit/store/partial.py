"""Whose work a half-written store is: the model that encodes it and how its pictures are read."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from clipkit.errors import ArtifactError, ModelMismatchError
from clipkit.manifest import ModelRef, is_complete, partial_path, read_manifest, write_json

OWNER = "partial.json"
EXACT = "exact"
"""How pictures were read before there was another way."""


@dataclass(frozen=True)
class Owner:
    """What all vectors of a store have in common.

    Attributes:
        model: what encodes them.
        decode: how their pictures are read, "exact" or "fast".
    """

    model: ModelRef
    decode: str

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Of the half-written store in ``folder``; None where that is not known."""
        try:
            found = json.loads((folder / OWNER).read_text(encoding="utf-8"))
            return cls(ModelRef(**found["model"]), found.get("decode", EXACT))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Say whose the half-written store in ``folder`` is."""
        write_json(folder / OWNER, asdict(self))

    def require(self, other: Self, folder: Path) -> None:
        """Refuse to go on with the store in ``folder``, which is of this owner, as another.

        Raises:
            ModelMismatchError: another model began it.
            ArtifactError: its pictures were read in another way.
        """
        if self.model.fingerprint != other.model.fingerprint:
            raise ModelMismatchError(
                f"{folder} is a half-written store of {self.model}, but the model at hand is "
                f"{other.model}; go on with that model or remove the directory"
            )
        require_decode(f"{folder} is a half-written store", self.decode, other.decode)


def require_decode(what: str, found: str, asked: str) -> None:
    """Refuse to mix pictures read in two ways; raises ArtifactError."""
    if found != asked:
        raise ArtifactError(
            f"{what} made with --decode {found}, asked for is {asked}; leave --decode out, or name "
            "another place with --out"
        )


def decode_of(path: Path) -> str | None:
    """How pictures of the store at ``path`` were read, half-written or finished; None: no store."""
    owner = Owner.read(partial_path(path))
    if owner is not None:
        return owner.decode
    if is_complete(path):
        return str(read_manifest(path, "store").detail.get("decode", EXACT))
    return None
