"""The scripts beside the package, imported from where they lie."""

import importlib
import sys
from types import ModuleType

from tests.helpers.paths import RECIPES, SCRIPTS


def script(name: str) -> ModuleType:
    """A script as a module; scripts import one another by their plain names."""
    for folder in map(str, (SCRIPTS, RECIPES)):
        if folder not in sys.path:
            sys.path.append(folder)
    return importlib.import_module(name)
