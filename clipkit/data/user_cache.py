"""The directory where a person's own files of clipkit are kept from one command to the next."""

import os
from pathlib import Path

PLACE = "CLIPKIT_CACHE"
"""Environment variable: another directory for the cache, or ``off``."""


def cache_folder() -> Path | None:
    """``$CLIPKIT_CACHE``, else ``clipkit`` in the user's cache directory; None if there is none."""
    own = os.environ.get(PLACE)
    if own:
        return None if own == "off" else Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "clipkit"
    except RuntimeError:  # nobody's home is known
        return None
