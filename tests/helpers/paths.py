"""Where the checkout's parts lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "clipkit"
SCRIPTS = ROOT / "scripts"
RECIPES = SCRIPTS / "recipes"
NOTEBOOKS = ROOT / "notebooks"
SHARED = ROOT.parent / "shared" / "data"
