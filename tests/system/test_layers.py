"""The layer order of the package, and what importing it must not load."""

import ast
import subprocess
import sys

import pytest

from tests.helpers.paths import PACKAGE

# Imports point down only.
LAYERS = [
    {"errors", "shapes"},
    {"arguments", "artifacts", "config", "display", "progress", "user_cache"},
    {"data"},
    {"evaluation"},
    {"models", "store"},
    {"index"},
    {"classifiers", "training"},
    {"reports"},
    {"web"},
    {"tasks"},
    {"demo"},
    {"cli"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
# Indexing a folder embeds it first.
TASK_IMPORTS = {("index", "embed")}
# A comparison evaluates two models; a suite runs many evaluations.
TASK_IMPORTS |= {("compare", "evaluate"), ("suite", "evaluate")}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py",))


def imports(path):
    """Modules of clipkit that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipkit."):
            yield node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("clipkit."):
                    yield alias.name.split(".")[1:]


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0], parts[-1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    layer, name = room(path)
    if layer == "__init__":
        return
    for module in imports(path):
        target = module[0]
        assert HEIGHT[target] <= HEIGHT[layer], f"{path} imports {'.'.join(module)}"
        if layer != target and HEIGHT[layer] == HEIGHT[target] > 1:
            pytest.fail(
                f"{path}: {layer} and {target} are in one layer and do not import each other"
            )
        if layer == target == "tasks" and module[1:] != [name]:
            assert (name, module[1]) in TASK_IMPORTS, f"{path}: tasks do not import one another"


def loaded_by(code):
    """Names of the modules that a fresh interpreter holds after running ``code``."""
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import clipkit", "import clipkit.cli", "import clipkit.errors"])
def test_light_imports(code):
    assert not loaded_by(code) & {
        "torch",
        "faiss",
        "datasets",
        "open_clip",
        "pandas",
        "numpy",
        "jaxtyping",
    }


def test_help_imports_neither_torch_nor_faiss():
    code = (
        "import sys, clipkit.cli\nsys.argv = ['clipkit', '--help']\n"
        "try:\n    clipkit.cli.main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert not loaded_by(code) & {"torch", "faiss", "datasets", "open_clip", "numpy", "jaxtyping"}


def test_the_store_never_loads_torch():
    code = "import clipkit.store.embedding_store, clipkit.index.vector_index"
    assert not loaded_by(code) & {"torch", "jaxtyping"}
